// csrc/cuda/repack_weight.cu, compiled for the CPU.
#include "cuda/repack_weight.cu"
