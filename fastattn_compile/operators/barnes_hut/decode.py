from fastattn_compile.operators.base import Decoder
class BarnesHutDecoder(Decoder):
    pass
