// csrc/cuda/quantize.cu, compiled for the CPU.
#include "cuda/quantize.cu"

extern "C" void set_schedule(int schedule) { llmqat::emulated::schedule = schedule; }
