// csrc/cuda/quantize.cu, compiled for the CPU.
#include "cuda/quantize.cu"
