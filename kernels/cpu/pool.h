// Threads that share the pieces of a kernel.
//
// A kernel's pieces are few and take microseconds, so what counts is how soon they begin: a thread that has just worked
// looks for more for a moment before it sleeps, giving way to any other that wants its processor. A piece belongs to
// whoever comes first, the caller included, so that one that sleeps or was taken off its processor holds up nothing that
// it has not begun.
#pragma once

#include <cstdint>

// piece(context, i) for every i in [0, pieces), on at most ``threads`` threads; returns when all are done. Called while
// another kernel is at work, from another thread, it does everything itself.
void run_pieces(int64_t pieces, int threads, void (*piece)(void *context, int64_t i), void *context);
