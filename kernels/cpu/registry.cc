// Registry of the kernels by name, and their number of threads.
#include <sched.h>

#include <cstdlib>
#include <thread>

#include "kernel.h"

namespace {
struct Entry {
  const char *name;
  int inputs, outputs, scalars;
  Kernel kernel;
};
std::vector<Entry> &entries() {
  static std::vector<Entry> all;  // made on first use: other files' registrations may run before this file's statics
  return all;
}
int allowed_threads = 0;

// OMP_NUM_THREADS, or the processors of the process's affinity mask, as other libraries count them.
int default_threads() {
  const char *text = std::getenv("OMP_NUM_THREADS");
  const int asked = text ? std::atoi(text) : 0;
  if (asked > 0) return asked;
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}
}  // namespace

Registration::Registration(const char *name, int inputs, int outputs, int scalars, Kernel kernel) {
  entries().push_back({name, inputs, outputs, scalars, kernel});
}

int threads_for(int64_t n, int64_t grain) {
  static const int usual = default_threads();
  const int64_t most = allowed_threads ? allowed_threads : usual;
  return static_cast<int>(std::max<int64_t>(1, std::min(most, n / std::max<int64_t>(1, grain))));
}

extern "C" {
int tele_kernel(const char *name, int *inputs, int *outputs, int *scalars) {
  for (size_t i = 0; i < entries().size(); i++) {
    const Entry &entry = entries()[i];
    if (std::strcmp(entry.name, name) == 0) {
      *inputs = entry.inputs, *outputs = entry.outputs, *scalars = entry.scalars;
      return static_cast<int>(i);
    }
  }
  return -1;
}
void tele_run(int number, const View *in, const View *out, const double *scalars) {
  entries()[number].kernel(in, out, scalars);
}
void tele_set_threads(int threads) { allowed_threads = threads; }
}
