"""Ways into fastattn_compile that go through another library's own extension points."""
