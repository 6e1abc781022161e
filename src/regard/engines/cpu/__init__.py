"""The engine `cpu`: `engine` speaks to torch, `calls` and `call_struct` to the C++ in csrc."""
