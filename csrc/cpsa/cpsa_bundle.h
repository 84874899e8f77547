// How a CPSA call is cut into bundles: some units that a kernel takes through its steps together.
#pragma once

#include "cpsa_tokens.h"

namespace xattn::XATTN_ISA {

constexpr int64_t kQueryBlock = 16;  // queries whose scores are in scratch at a time; even
// Tokens over which a backward sums weight gradients before it sums them over the lanes.
constexpr int64_t kTokensPerSum = 64;

template <class S, class M>
struct Bundles {
  const CpsaArgs& args;
  PatchMap<S, M> map;
  int64_t patches;
  int64_t slots;     // for a unit's tokens: whole steps, unless there is but one
  int64_t elements;  // whole steps
  int64_t units_per_bundle, bundles;

  // As many units as have `tokens` tokens, at least one.
  Bundles(const CpsaArgs& a, int64_t tokens, Arena& arena)
      : args(a),
        map(a, arena),
        patches(a.patches),
        slots(a.patches == 1 ? 1 : round_up(a.patches, M::kStep)),
        elements(round_up(a.elements, M::kStep)) {
    units_per_bundle = max_of<int64_t>(1, tokens / slots);
    bundles = (map.units() + units_per_bundle - 1) / units_per_bundle;
  }

  // Room for the tokens of a bundle.
  int64_t bundle_slots() const { return round_up(units_per_bundle * slots, M::kStep); }

  // Lists the tokens of a bundle, filled up to whole steps; returns their number.
  int64_t list_bundle(int64_t bundle, Place* places) const {
    const int64_t first = bundle * units_per_bundle;
    const int64_t last = min_of(first + units_per_bundle, map.units());
    map.list_tokens(first, last, slots, places);
    const int64_t count = (last - first) * slots, whole = round_up(count, M::kStep);
    for (int64_t t = count; t < whole; ++t) places[t] = Place{};
    return whole;
  }
};

}  // namespace xattn::XATTN_ISA
