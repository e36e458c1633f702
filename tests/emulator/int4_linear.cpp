// csrc/cuda/int4_linear.cu, compiled for the CPU.
#include "cuda/int4_linear.cu"

extern "C" void plan(int64_t m, int64_t n, int64_t k, bool regular, int64_t sms, int64_t* out) {
  const llmqat::Int4Plan plan = llmqat::int4_plan(m, n, k, regular, sms);
  out[0] = plan.token_tile;
  out[1] = plan.splits;
  out[2] = plan.tiles;
  out[3] = llmqat::int4_workspace_bytes(plan);
}
