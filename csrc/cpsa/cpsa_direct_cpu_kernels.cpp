// Cross-patch attention with any number of heads and dropout on the attention weights, on one core
// of the CPU, for one ISA: queries, keys and values are computed. 16-bit types compute in float.
//
// With Q scaled, W the softmax, m the dropout factors, Wm = W m, Z = Wm V, and dO the gradient of
// the result, per head:
//   dZ = dO Wo      dWm = dZ V^T    dW = dWm m      dS = W (dW - rowsum(W dW))
//   dQ = dS K       dK = dS^T Q     dV = Wm^T dZ
#include "cpsa_direct.h"

namespace xattn::XATTN_ISA {
namespace {

static_assert(kQueryBlock % 4 == 0, "the dropout generator gives four queries at a time");

// S: storage type.
template <class S>
struct Direct {
  using T = typename ComputeOf<S>::type;
  using M = Single<T>;
  using Weights = DirectWeights<S, M>;
  using Sums = DirectSums<T>;
  static constexpr int L = kLanesOf<M>;

  // Channels [first, first + D) of tokens of `width` vectors, as rows over the channels or as
  // columns summed over the tokens.
  static Factor<M> rows(const T* tokens, int64_t width, int64_t first) {
    return {tokens + first * L, width * L, L};
  }
  static Factor<M> columns(const T* tokens, int64_t width, int64_t first) {
    return {tokens + first * L, L, width * L};
  }
  static StoreSink<T> into(T* tokens, int64_t width, int64_t first, bool add = false) {
    return {tokens + first * L, width * L, add};
  }

  // ---------------------------------------------------------------- forward

  struct Forward : Bundles<S, M> {
    using Base = Bundles<S, M>;
    using Base::args, Base::map, Base::patches, Base::elements;
    ResultWriter<S, M> writer;
    DropoutMask<T> mask;
    Place* places;
    Tokens<M> x;
    T* key_value;  // [token][2P]
    T* query;      // of a block: [query][P]
    T* result;     // of a block, all heads: [query][P]
    T* scores;     // of a block, one head: [query][key]
    T* inverse;    // [query]: one over the row's sum
    int64_t head_dim, bytes;

    Forward(const CpsaArgs& a, void* memory) : Forward(a, Arena(memory)) {}
    Forward(const CpsaArgs& a, Arena arena)
        : Base(a, 1, arena),
          writer(a, map, arena),
          mask(a, arena, kQueryBlock, score_row(patches, L)),
          head_dim(elements / a.heads) {
      places = arena.take<Place>(patches);
      x = TokenLayout<M>{elements}.take(arena, patches, true, true);
      key_value = arena.take<T>(patches * 2 * elements * L);
      query = arena.take<T>(kQueryBlock * elements * L);
      result = arena.take<T>(kQueryBlock * elements * L);
      scores = arena.take<T>(kQueryBlock * score_row(patches, L));
      inverse = arena.take<T>(kQueryBlock * L);
      bytes = arena.used();
    }

    int64_t blocks() const { return (patches + kQueryBlock - 1) / kQueryBlock; }

    void run(const Weights& w, int64_t begin, int64_t end) {
      map.begin();
      for (int64_t item = begin; item < end; ++item) {
        const int64_t unit = item / args.query_ranges, range = item % args.query_ranges;
        this->list_bundle(unit, places);
        map.gather(map.x(), places, patches, x);
        linear<M>(patches, over_elements(x), w.key_value, into(key_value, 2 * elements, 0));
        const int64_t last = (range + 1) * blocks() / args.query_ranges;
        for (int64_t b = range * blocks() / args.query_ranges; b < last; ++b) {
          const int64_t first = b * kQueryBlock, count = min_of(kQueryBlock, patches - first);
          linear<M>(count, over_elements(from(x, first)), w.query, into(query, elements, 0));
          for (int64_t head = 0; head < args.heads; ++head) attend(head, first, count);
          writer.write(count, places + first, rows(result, elements, 0), w.proj, {});
        }
      }
    }

    void attend(int64_t head, int64_t first, int64_t count) {
      const int64_t n = elements, at = head * head_dim, row = score_row(patches, L);
      product<M>(count, rows(query, n, at), patches, rows(key_value, 2 * n, at), head_dim,
                 StoreSink<T>{scores, row});
      softmax_rows<M>(scores, row, count, patches, patches, scores, inverse);
      if (mask.wanted()) {
        const Place& place = places[0];
        mask.draw(place.image * args.channels + place.channel, head, first, count, patches);
        for (int64_t q = 0; q < count; ++q) {
          multiply_rows(scores + q * row, mask.row(q), patches * L);
        }
      }
      const Tokens<M> out{result + at * L, result + at * L, n * L, n * L};
      product<M>(count, {scores, row, L}, head_dim, columns(key_value, 2 * n, n + at), patches,
                 TokenSink<M, true>{out, inverse});
    }
  };

  static void multiply_rows(T* row, const T* factor, int64_t values) {
    for (int64_t i = 0; i < values; i += L) store(row + i, load(row + i) * load(factor + i));
  }

  // ---------------------------------------------------------------- backward

  struct Backward : Bundles<S, M> {
    using Base = Bundles<S, M>;
    using Base::args, Base::map, Base::patches, Base::elements;
    ResultWriter<S, M> writer;
    DropoutMask<T> mask;
    Place* places;
    // Of the bundle.
    Tokens<M> x, grad_out;
    T *query, *key_value;        // [token][P], [token][2P]
    Tokens<M> result, grad_qkv;  // [token][P] before the projection; [token][3P]
    T* grad_result;              // [token][P]: dZ of all heads
    T* scores;                   // of a block, one head: dWm then Wm; S then dS; [query][key]
    int64_t head_dim, bytes;

    Backward(const CpsaArgs& a, void* memory) : Backward(a, Arena(memory)) {}
    Backward(const CpsaArgs& a, Arena arena)
        : Base(a, kTokensPerSum, arena),
          writer(a, map, arena),
          mask(a, arena, kQueryBlock, score_row(patches, L)),
          head_dim(elements / a.heads) {
      const int64_t tokens = this->bundle_slots();
      const TokenLayout<M> layout{elements};
      places = arena.take<Place>(tokens);
      x = layout.take(arena, tokens, true, true);
      grad_out = layout.take(arena, tokens, true, true);
      result = layout.take(arena, tokens, true, true);
      grad_qkv = TokenLayout<M>{3 * elements}.take(arena, tokens, true, true);
      query = arena.take<T>(tokens * elements * L);
      key_value = arena.take<T>(tokens * 2 * elements * L);
      grad_result = arena.take<T>(tokens * elements * L);
      scores = arena.take<T>(2 * kQueryBlock * score_row(patches, L));
      bytes = arena.used();
    }

    void run(const Weights& w, int64_t begin, int64_t end, const Sums& sums) {
      const int64_t n = elements;
      map.begin();
      for (int64_t bundle = begin; bundle < end; ++bundle) {
        const int64_t tokens = this->list_bundle(bundle, places);
        map.gather(map.x(), places, tokens, x);
        map.gather(map.grad_out(), places, tokens, grad_out);
        linear<M>(tokens, over_elements(x), w.query, into(query, n, 0));
        linear<M>(tokens, over_elements(x), w.key_value, into(key_value, 2 * n, 0));
        linear<M>(tokens, over_elements(grad_out), w.proj_back, into(grad_result, n, 0));
        for (int64_t unit = 0; unit < tokens; unit += patches) {
          for (int64_t head = 0; head < args.heads; ++head) attend_back(unit, head);
        }
        writer.write(tokens, places, over_elements(grad_qkv), w.qkv_back, {});
        product<M>(3 * n, over_tokens(grad_qkv), n, over_tokens(x), tokens,
                   LaneSumSink<T>{sums.qkv, n});
        product<M>(n, over_tokens(grad_out), n, over_tokens(result), tokens,
                   LaneSumSink<T>{sums.proj, n});
        add_token_sums<M>(grad_qkv, tokens, 3 * n, sums.qkv_bias);
        add_token_sums<M>(grad_out, tokens, n, sums.proj_bias);
      }
    }

    // Z, dQ, dK and dV of one head of the unit whose tokens begin at `unit`.
    void attend_back(int64_t unit, int64_t head) {
      const int64_t n = elements, at = head * head_dim, row = score_row(patches, L);
      const T* keys = key_value + unit * 2 * n * L;
      T* grad = grad_qkv.by_element + unit * 3 * n * L;
      for (int64_t first = 0; first < patches; first += kQueryBlock) {
        const int64_t count = min_of(kQueryBlock, patches - first), token = unit + first;
        const T* q = query + token * n * L;
        const T* grad_z = grad_result + token * n * L;
        T* weights = scores;  // dWm, then Wm
        T* grad_scores = scores + count * row;
        product<M>(count, rows(grad_z, n, at), patches, rows(keys, 2 * n, n + at), head_dim,
                   StoreSink<T>{weights, row});
        product<M>(count, rows(q, n, at), patches, rows(keys, 2 * n, at), head_dim,
                   StoreSink<T>{grad_scores, row});
        differentiate(head, first, count, places[unit], weights, grad_scores);
        product<M>(count, {weights, row, L}, head_dim, columns(keys, 2 * n, n + at), patches,
                   into(result.by_element + token * n * L, n, at));
        product<M>(count, {grad_scores, row, L}, head_dim, columns(keys, 2 * n, at), patches,
                   into(grad + first * 3 * n * L, 3 * n, at));
        product<M>(patches, {grad_scores, L, row}, head_dim, columns(q, n, at), count,
                   into(grad, 3 * n, n + at, first > 0));
        product<M>(patches, {weights, L, row}, head_dim, columns(grad_z, n, at), count,
                   into(grad, 3 * n, 2 * n + at, first > 0));
      }
    }

    // dWm and the logits of a block become Wm and dS.
    void differentiate(int64_t head, int64_t first, int64_t count, const Place& place, T* weights,
                       T* grad_scores) {
      const int64_t row = score_row(patches, L), values = patches * L;
      if (mask.wanted()) {
        mask.draw(place.image * args.channels + place.channel, head, first, count, patches);
        for (int64_t q = 0; q < count; ++q) multiply_rows(weights + q * row, mask.row(q), values);
      }
      RowWeights<M>::differentiate_rows(weights, grad_scores, row, count, patches);
      if (mask.wanted()) {
        for (int64_t q = 0; q < count; ++q) multiply_rows(weights + q * row, mask.row(q), values);
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
    return {b.bundles, 1, weights.bytes, b.bytes, Sums(args.elements, nullptr).bytes};
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
    Backward(args, scratch).run(w, begin, end, Sums(args.elements, sums));
  }
  static void finish(const CpsaArgs& args, void* weights, void* sums, int64_t count) {
    const Sums total(args.elements, sums);
    add_up(static_cast<T*>(sums), total.bytes, count);
    Weights(args, CpsaPass::kBackward, weights).write_gradients(args, total);
  }

  static constexpr CpsaKernels kKernels = {plan, prepare, forward, backward, finish};
};

const CpsaKernels* kernels(Dtype dtype) {
  const CpsaKernels* found = nullptr;
  with_storage(dtype,
               [&](auto storage) { found = &Direct<typename decltype(storage)::type>::kKernels; });
  return found;
}

}  // namespace

extern const CpsaForm cpsa_direct = {kernels};

}  // namespace xattn::XATTN_ISA
