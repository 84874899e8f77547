// Cross-patch attention with one head and no dropout, on one core of the CPU, for one ISA.
//
// With A = s Wq^T Wk, a = s bq Wk, B = Wv^T Wo^T, b = bv Wo^T + bo, the tokens X [T, P] of a
// channel give  softmax((X A + a) X^T) X B + b  exactly: two projections in place of four, and
// queries alone are computed (bk adds the same number to a whole row and cancels). Backward, with
// Y = X A + a, W the softmax, Z = W X and dO the gradient of the result:
//   dZ = dO B^T     dW = dZ X^T     dS = W (dW - rowsum(W dW))     dY = dS X
//   dX = W^T dZ + dS^T Y + dY A^T   dA = X^T dY   da = sum dY   dB = Z^T dO   db = sum dO
// and the gradients of the four weights follow from dA, da, dB, db. A single token's softmax is 1:
// then X B + b is all there is, and the gradients of q and k are zero.
#include "cpsa_absorbed.h"

namespace xattn::XATTN_ISA {
namespace {

constexpr int64_t kQueryBlock = 16;  // queries whose scores are in scratch at a time
// S: storage type. M: multiply policy.
template <class S, class M>
struct Absorbed {
  using T = typename M::Acc;
  using Elem = typename M::Elem;
  using Weights = AbsorbedWeights<S, M>;
  using Sums = AbsorbedSums<T>;
  static constexpr int L = kLanesOf<M>;

  // ---------------------------------------------------------------- forward

  struct Forward : Bundles<S, M> {
    ResultWriter<S, M> writer;
    Place *places, *next_places;
    Tokens<M> x;      // of the bundle
    Tokens<M> query;  // of a block: Y, then Z
    T* scores;        // [query][key]
    Elem* weights;    // the softmax as a factor over keys: the scores themselves, or packed
    T* inverse;       // [query]: one over the row's sum
    int64_t bytes;

    using Base = Bundles<S, M>;
    using Base::args, Base::map, Base::patches, Base::slots, Base::elements, Base::bundles;

    Forward(const CpsaArgs& a, void* memory) : Forward(a, Arena(memory)) {}
    Forward(const CpsaArgs& a, Arena arena)
        : Base(a, a.patches == 1 ? TileShape<M>::kRows : 1, arena), writer(a, map, arena) {
      const TokenLayout<M> layout{elements};
      const int64_t tokens = this->bundle_slots();
      places = arena.take<Place>(tokens);
      next_places = arena.take<Place>(tokens);
      x = layout.take(arena, tokens, true, patches > 1);
      query = layout.take(arena, kQueryBlock, true, false);
      inverse = arena.take<T>(kQueryBlock * L);
      scores = arena.take<T>(kQueryBlock * score_row(slots, L));
      weights = M::kStep == 1 ? (Elem*)scores
                              : arena.take<Elem>(kQueryBlock * score_row(slots / M::kStep, L));
      bytes = arena.used();
    }

    int64_t blocks() const { return patches == 1 ? 1 : (slots + kQueryBlock - 1) / kQueryBlock; }

    void run(const Weights& w, int64_t begin, int64_t end) {
      map.begin();
      int64_t tokens = this->list_bundle(begin / args.query_ranges, places), next_tokens = 0;
      for (int64_t item = begin; item < end; ++item) {
        const int64_t bundle = item / args.query_ranges, range = item % args.query_ranges;
        if (item > begin && range == 0) {
          exchange(places, next_places);
          tokens = next_tokens;
        }
        map.gather(map.x(), places, tokens, x);
        next_tokens = bundle + 1 < bundles ? this->list_bundle(bundle + 1, next_places) : 0;
        if (patches == 1) {
          writer.write(tokens, places, over_elements(x), w.result, {next_places, next_tokens});
          continue;
        }
        const int64_t last = (range + 1) * blocks() / args.query_ranges;
        for (int64_t b = range * blocks() / args.query_ranges; b < last; ++b) {
          const int64_t first = b * kQueryBlock, count = min_of(kQueryBlock, slots - first);
          attend(w, first, count);
          writer.write(count, places + first, over_elements(query), w.result,
                       {next_places + first, next_tokens - first});
        }
      }
    }

    // `query` = softmax((X A + a) X^T) X of `count` queries.
    void attend(const Weights& w, int64_t first, int64_t count) {
      linear<M>(count, over_elements(from(x, first)), w.query, TokenSink<M>{query});
      const int64_t row = score_row(slots, L);
      product<M>(count, over_elements(query), slots, over_elements(x), elements / M::kStep,
                 StoreSink<T>{scores, row});
      const int64_t weight_row =
          softmax_rows<M>(scores, row, count, patches, slots, weights, inverse);
      product<M>(count, {weights, weight_row, L}, elements, over_tokens(x), slots / M::kStep,
                 TokenSink<M, true>{query, inverse});
    }
  };

  // ---------------------------------------------------------------- backward

  struct Backward : Bundles<S, M> {
    ResultWriter<S, M> writer;
    Place *places, *next_places;
    Tokens<M> x, grad_out;    // of the bundle
    Tokens<M> z, grad_query;  // of the bundle: Z and dY
    Tokens<M> block;          // of a block of queries: dZ, then Y
    T* scores;                // of a block: dW, then the logits; [query][key]
    RowWeights<M> weights;    // of a block: the softmax, then dS
    T* grad_x;                // of the bundle, without dY A^T
    int64_t bytes;

    using Base = Bundles<S, M>;
    using Base::args, Base::map, Base::patches, Base::slots, Base::elements, Base::bundles;

    Backward(const CpsaArgs& a, void* memory) : Backward(a, Arena(memory)) {}
    Backward(const CpsaArgs& a, Arena arena)
        : Base(a, kTokensPerSum, arena), writer(a, map, arena) {
      const TokenLayout<M> layout{elements};
      const int64_t tokens = this->bundle_slots();
      const bool attends = patches > 1;
      places = arena.take<Place>(tokens);
      next_places = arena.take<Place>(tokens);
      x = layout.take(arena, tokens, attends, true);
      grad_out = layout.take(arena, tokens, true, true);
      if (attends) {
        z = layout.take(arena, tokens, false, true);
        grad_query = layout.take(arena, tokens, true, true);
        block = layout.take(arena, 2 * kQueryBlock, true, true);
        grad_x = arena.take<T>(tokens * elements * L);
        scores = arena.take<T>(2 * kQueryBlock * score_row(slots, L));
        weights = RowWeights<M>(arena, scores, 2 * kQueryBlock, slots);
      }
      bytes = arena.used();
    }

    void run(const Weights& w, int64_t begin, int64_t end, const Sums& sums) {
      map.begin();
      for (int64_t bundle = begin; bundle < end; ++bundle) {
        const int64_t tokens = this->list_bundle(bundle, places);
        map.gather(map.x(), places, tokens, x);
        map.gather(map.grad_out(), places, tokens, grad_out);
        // The next bundle may be of the next part: a thread takes parts in order.
        const int64_t next_tokens =
            bundle + 1 < bundles ? this->list_bundle(bundle + 1, next_places) : 0;
        // Asked for only now: any sooner, and it would be pushed out of the cache again.
        const auto ahead = typename ResultWriter<S, M>::Ahead{next_places, next_tokens, true};
        const int64_t steps = tokens / M::kStep;
        const LaneSumSink<T> add_to_b{sums.b, elements}, add_to_a{sums.a, elements};
        if (patches == 1) {
          writer.write(tokens, places, over_elements(grad_out), w.result_back, ahead);
          product<M>(elements, over_tokens(x), elements, over_tokens(grad_out), steps, add_to_b);
        } else {
          for (int64_t t = 0; t < tokens; t += slots) attend_back(w, t);
          writer.write(tokens, places, over_elements(grad_query), w.query_back, ahead, grad_x,
                       elements * L);
          product<M>(elements, over_tokens(x), elements, over_tokens(grad_query), steps, add_to_a);
          product<M>(elements, over_tokens(z), elements, over_tokens(grad_out), steps, add_to_b);
          add_token_sums<M>(grad_query, steps, elements, sums.a_bias);
        }
        add_token_sums<M>(grad_out, steps, elements, sums.b_bias);
      }
    }

    // Z, dY and dX without dY A^T of the unit whose tokens begin at slot `unit`.
    void attend_back(const Weights& w, int64_t unit) {
      const Tokens<M> keys = from(x, unit);
      const int64_t inner = elements / M::kStep, row = score_row(slots, L);
      for (int64_t first = 0; first < slots; first += kQueryBlock) {
        const int64_t n = min_of(kQueryBlock, slots - first), token = unit + first;
        const Tokens<M> grad_z = block, y = from(block, n);
        linear<M>(n, over_elements(from(grad_out, token)), w.result_back, TokenSink<M>{grad_z});
        linear<M>(n, over_elements(from(x, token)), w.query, TokenSink<M>{y});
        product<M>(2 * n, over_elements(block), slots, over_elements(keys), inner,
                   StoreSink<T>{scores, row});
        weights.differentiate(scores, row, n, patches, slots);
        // W^T dZ + dS^T Y: one product over 2 n rows.
        product<M>(slots, weights.over_queries(), elements, over_tokens(block), 2 * n / M::kStep,
                   StoreSink<T>{grad_x + unit * elements * L, elements * L, first > 0});
        product<M>(n, weights.over_keys(0), elements, over_tokens(keys), slots / M::kStep,
                   TokenSink<M>{from(z, token)});
        product<M>(n, weights.over_keys(n), elements, over_tokens(keys), slots / M::kStep,
                   TokenSink<M>{from(grad_query, token)});
      }
    }
  };

  // ---------------------------------------------------------------- entry points

  static CpsaPlan plan(const CpsaArgs& args, CpsaPass pass) {
    const Weights weights(args, pass, nullptr);
    if (pass == CpsaPass::kForward) {
      const Forward f(args, nullptr);
      return {f.bundles, f.blocks(), weights.bytes, f.bytes, 0};
    }
    const Backward b(args, nullptr);
    return {b.bundles, 1, weights.bytes, b.bytes, Sums(b.elements, nullptr).bytes};
  }
  static void prepare(const CpsaArgs& args, CpsaPass pass, void* weights) {
    Weights(args, pass, weights).compute(args, pass);
  }
  static void forward(const CpsaArgs& args, const void* weights, int64_t begin, int64_t end,
                      void* scratch) {
    const Weights w(args, CpsaPass::kForward, const_cast<void*>(weights));
    Forward(args, scratch).run(w, begin, end);
  }
  static void backward(const CpsaArgs& args, const void* weights, int64_t begin, int64_t end,
                       void* sums, void* scratch) {
    const Weights w(args, CpsaPass::kBackward, const_cast<void*>(weights));
    Backward b(args, scratch);
    b.run(w, begin, end, Sums(b.elements, sums));
  }
  static void finish(const CpsaArgs& args, void* weights, void* sums, int64_t count) {
    const Weights w(args, CpsaPass::kBackward, weights);
    const int64_t elements = round_up(args.elements, M::kStep);
    const Sums total(elements, sums);
    add_up(static_cast<T*>(sums), total.bytes, count);
    w.write_gradients(args, total);
  }

  static constexpr CpsaKernels kKernels = {plan, prepare, forward, backward, finish};
};

const CpsaKernels* kernels(Dtype dtype) {
  const CpsaKernels* found = nullptr;
  with_policy(dtype, [&](auto storage, auto policy) {
    found = &Absorbed<typename decltype(storage)::type, typename decltype(policy)::type>::kKernels;
  });
  return found;
}

}  // namespace

extern const CpsaForm cpsa_absorbed = {kernels};

}  // namespace xattn::XATTN_ISA
