// The kernels' own threads. Started at first use, again in a forked child; they sleep between calls.
#pragma once
#include <cstdint>

namespace thresher {

// Calls body(context, part) once for each part of 0 .. parts - 1 on up to `threads` threads, this one among them; parts
// are taken in ascending order. Where the threads are at work for somebody else, this one does everything.
void run_parts(int64_t parts, int threads, void (*body)(void*, int64_t), void* context);

// As run_parts, for anything that can be called with a part.
template <class Body>
static void parallel_for(int64_t parts, int threads, const Body& body) {
  auto call = [](void* context, int64_t part) { (*static_cast<const Body*>(context))(part); };
  run_parts(parts, threads, call, const_cast<Body*>(&body));
}

}  // namespace thresher
