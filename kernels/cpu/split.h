// float32 as a sum of three bfloat16 numbers: x = first + second + third.
//
// A float32 has 24 significant bits, a bfloat16 eight. ``first`` is x rounded to eight bits, ``second`` the remainder
// rounded, and what then remains has at most eight bits: the sum is exact, with |second| <= 2^-8 |x| and |third| <=
// 2^-17 |x|. A product of two such numbers without the terms second * third and third * third is exact to 2^-24.
//
// Limits. Bits below 2^-126 are lost in matrix tiles, which read a denormal bfloat16 as zero: a number below 2^-102 has
// fewer than 24 bits there, one below 2^-126 none. Finite numbers that would round to an infinite bfloat16 are cut
// instead, and stay exact. The parts of an infinity or a NaN add up to NaN.
#pragma once

#include "vec.h"

struct Split {
  vf first, second, third;  // each with its upper sixteen bits alone
};

constexpr uint32_t kUpperHalf = 0xffff0000u;

// x rounded to a bfloat16, halves away from zero; cut where the rounded number would be infinite.
static inline vf round_upper(vf x) {
  constexpr int32_t kLargest = 0x7f7f8000;  // the first magnitude that rounds to infinity
  const vi rounds = ((vi)x & 0x7fffffff) < kLargest;
  return (vf)(((vu)x + ((vu)rounds & 0x8000u)) & kUpperHalf);
}

static inline Split split(vf x) {
  const vf first = round_upper(x), rest = x - first;
  const vf second = (vf)(((vu)rest + 0x8000u) & kUpperHalf);  // at most 2^-7 of the largest number: it cannot overflow
  return {first, second, (vf)((vu)(rest - second) & kUpperHalf)};
}
