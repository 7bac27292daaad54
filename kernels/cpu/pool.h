// Thread pool for the pieces of a kernel.
//
// A kernel has few pieces of microseconds each, so the latency of their start matters: an idle thread spins briefly,
// yielding its processor, before it sleeps. Pieces are claimed dynamically, by the caller too: a thread that sleeps or
// loses its processor delays only the piece it has begun.
#pragma once

#include <cstdint>

// piece(context, i) for every i in [0, pieces) on at most ``threads`` threads; returns when all are done. While another
// thread's kernel uses the pool, the caller runs all pieces itself.
void run_pieces(int64_t pieces, int threads, void (*piece)(void *context, int64_t i), void *context);
