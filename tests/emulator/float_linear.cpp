// csrc/cuda/float_linear.cu, compiled for the CPU.
#include "cuda/float_linear.cu"
