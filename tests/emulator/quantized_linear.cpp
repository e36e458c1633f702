// csrc/cuda/quantized_linear.cu, compiled for the CPU.
#include "cuda/quantized_linear.cu"
