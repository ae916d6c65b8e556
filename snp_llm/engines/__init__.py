"""Pruned models in other engines: files for llama.cpp and ONNX Runtime, classes for vLLM."""
