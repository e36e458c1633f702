// csrc/cuda/rope_quantize_append.cu, compiled for the CPU.
#include "cuda/rope_quantize_append.cu"
