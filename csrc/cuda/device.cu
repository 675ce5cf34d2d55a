#include "ggro/cuda.h"
#include "portable.h"

namespace ggro::cuda {
namespace {

struct Nothing {
  using Args = int;
  static constexpr int kThreads = 32;
  static GGRO_DEVICE void run(Thread&, const Args&) {}
};

}  // namespace

std::string obstacle(int device) { return why_not<Nothing>(device); }

}  // namespace ggro::cuda
