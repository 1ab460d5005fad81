// Runs ONNX models in ONNX Runtime Web (WebAssembly) under Node, one after the other in turns.
//
// node benchmarks/onnx_web.mjs job.json
//
// The job: {package, threads, repeats, models: [{name, path, inputs: {name: {path, dims}}, output}]}, with raw float32 files.
// `package` is a folder in which `npm install onnxruntime-web` was run. Prints one JSON object: version, and for each model
// the times of its runs in ms or the error it stopped with. The first output goes to the file `output`.

import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

const job = JSON.parse(readFileSync(process.argv[2], "utf8"));
const require = createRequire(join(job.package, "package.json"));
const ort = require("onnxruntime-web/wasm");
ort.env.wasm.numThreads = job.threads;
ort.env.logLevel = "fatal";

function tensor({ path, dims }) {
  const bytes = readFileSync(path);
  return new ort.Tensor("float32", new Float32Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 4), dims);
}

// What the runtime says, without the places of its sources.
function reason(error) {
  return String(error.message ?? error).split("\n")[0].replace(/\S*\/onnxruntime\/\S+ /g, "");
}

async function prepared(model) {
  const start = performance.now();
  const session = await ort.InferenceSession.create(readFileSync(model.path), { executionProviders: ["wasm"] });
  const load = performance.now() - start;
  const feeds = Object.fromEntries(Object.entries(model.inputs).map(([name, given]) => [name, tensor(given)]));
  return { name: model.name, session, feeds, output: model.output, load, ms: [], error: null };
}

async function turn(item) {
  const start = performance.now();
  const outputs = await item.session.run(item.feeds);
  const spent = performance.now() - start;
  return { data: outputs[item.session.outputNames[0]].data, spent };
}

const items = [];
for (const model of job.models) {
  try {
    const item = await prepared(model);
    const { data } = await turn(item); // the first run makes the room that the next ones find
    if (item.output) writeFileSync(item.output, new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
    items.push(item);
  } catch (error) {
    items.push({ name: model.name, load: null, ms: [], error: reason(error) });
  }
}
for (let repeat = 0; repeat < job.repeats; repeat++) {
  for (const item of items) {
    if (item.error === null) item.ms.push((await turn(item)).spent);
  }
}
const results = items.map(({ name, load, ms, error }) => ({ name, load_ms: load, ms, error }));
console.log(JSON.stringify({ version: ort.env.versions.web, node: process.versions.node, results }));
process.exit(0); // threads of the runtime would keep the process
