// Every native operator of xattn_ops, one schema each, and the Python module that carries them.
//
// Built on LibTorch's stable ABI and Python's limited API: one binary serves every torch >= 2.10
// and every Python >= 3.10.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "common/isa.h"

#include <cstdlib>
#include <cstring>

STABLE_TORCH_LIBRARY(xattn_ops, m) {
  m.def(
      "ipsa_fwd(Tensor qkv, Tensor? bias_table, Tensor? pad_qkv, Tensor? seed, int num_heads, "
      "int window_h, int window_w, int shift_h, int shift_w, float scale, float dropout_p) "
      "-> Tensor");
  m.def(
      "ipsa_bwd(Tensor grad_out, Tensor qkv, Tensor? bias_table, Tensor? pad_qkv, Tensor? seed, "
      "int num_heads, int window_h, int window_w, int shift_h, int shift_w, float scale, "
      "float dropout_p) -> (Tensor grad_qkv, Tensor grad_bias_table, Tensor grad_pad_qkv)");
  m.def("ipsa_pack_weight(Tensor weight) -> Tensor");
  m.def(
      "ipsa_block_fwd(Tensor x, Tensor qkv_packed, Tensor? qkv_bias, Tensor proj_packed, "
      "Tensor? proj_bias, Tensor? bias_table, int num_heads, int window_h, int window_w, "
      "int shift_h, int shift_w, float scale) -> Tensor");
  m.def(
      "cpsa_fwd(Tensor x, Tensor qkv_weight, Tensor? qkv_bias, Tensor proj_weight, "
      "Tensor? proj_bias, Tensor? seed, int patch_h, int patch_w, int num_heads, float scale, "
      "float dropout_p) -> Tensor");
  m.def(
      "cpsa_bwd(Tensor grad_out, Tensor x, Tensor qkv_weight, Tensor? qkv_bias, "
      "Tensor proj_weight, Tensor? proj_bias, Tensor? seed, int patch_h, int patch_w, "
      "int num_heads, float scale, float dropout_p) -> (Tensor grad_x, Tensor grad_qkv_weight, "
      "Tensor grad_qkv_bias, Tensor grad_proj_weight, Tensor grad_proj_bias)");
  m.def(
      "convrel_fwd(Tensor qkv, Tensor conv_weight, Tensor? conv_bias, int[] windows, "
      "int[] channels, int num_heads, SymInt grid_h, SymInt grid_w, int num_prefix_tokens, float "
      "scale) "
      "-> (Tensor out, Tensor state)");
  m.def(
      "convrel_bwd(Tensor grad_out, Tensor qkv, Tensor conv_weight, Tensor? conv_bias, "
      "Tensor state, int[] windows, int[] channels, int num_heads, SymInt grid_h, SymInt grid_w, "
      "int num_prefix_tokens, float scale) "
      "-> (Tensor grad_qkv, Tensor grad_conv_weight, Tensor grad_conv_bias)");
  m.def(
      "convpos_fwd(Tensor x, Tensor weight, Tensor? bias, SymInt grid_h, SymInt grid_w, "
      "int num_prefix_tokens) -> Tensor");
  m.def(
      "convpos_bwd(Tensor grad_out, Tensor x, Tensor weight, Tensor? bias, SymInt grid_h, "
      "SymInt grid_w, int num_prefix_tokens) "
      "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "digest_fwd(Tensor qkv, Tensor? digest_kv, Tensor? bias_table, Tensor? digest_bias, "
      "Tensor? seed, int num_heads, SymInt grid_h, SymInt grid_w, int num_prefix_tokens, float "
      "scale, "
      "float dropout_p) -> (Tensor out, Tensor row_stats)");
  m.def(
      "digest_bwd(Tensor grad_out, Tensor qkv, Tensor? digest_kv, Tensor? bias_table, "
      "Tensor? digest_bias, Tensor row_stats, Tensor? seed, int num_heads, SymInt grid_h, SymInt "
      "grid_w, "
      "int num_prefix_tokens, float scale, float dropout_p) -> (Tensor grad_qkv, "
      "Tensor grad_digest_kv, Tensor grad_bias_table, Tensor grad_digest_bias)");
  m.def(
      "merge_fwd(Tensor x, Tensor? merge_weight, Tensor enhance_weight, Tensor? enhance_bias, "
      "SymInt grid_h, SymInt grid_w, int stride, int num_prefix_tokens) "
      "-> (Tensor digests, Tensor enhanced)");
  m.def(
      "merge_bwd(Tensor? grad_digests, Tensor? grad_enhanced, Tensor x, Tensor? merge_weight, "
      "Tensor enhance_weight, Tensor? enhance_bias, SymInt grid_h, SymInt grid_w, int stride, "
      "int num_prefix_tokens) -> (Tensor grad_x, Tensor grad_merge_weight, "
      "Tensor grad_enhance_weight, Tensor grad_enhance_bias)");
  m.def(
      "clsattn_fwd(Tensor cls_token, Tensor patches, Tensor q_weight, Tensor? q_bias, "
      "Tensor k_weight, Tensor v_weight, Tensor? v_bias, Tensor? norm_weight, Tensor? norm_bias, "
      "Tensor? seed, int num_heads, float eps, float scale, float dropout_p) "
      "-> (Tensor out, Tensor head_state, Tensor token_state)");
  m.def(
      "clsattn_bwd(Tensor grad_out, Tensor cls_token, Tensor patches, Tensor q_weight, "
      "Tensor? q_bias, Tensor k_weight, Tensor v_weight, Tensor? v_bias, Tensor? norm_weight, "
      "Tensor? norm_bias, Tensor head_state, Tensor token_state, Tensor? seed, int num_heads, "
      "float eps, float scale, float dropout_p) -> (Tensor grad_cls_token, Tensor grad_patches, "
      "Tensor grad_q_weight, Tensor grad_q_bias, Tensor grad_k_weight, Tensor grad_v_weight, "
      "Tensor grad_v_bias, Tensor grad_norm_weight, Tensor grad_norm_bias)");
}

namespace xattn {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "generic";
  }
}

static Isa best_isa() {
#if defined(XATTN_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::kAvx512Bf16;
  if (avx512) return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kGeneric;
}

Isa active_isa() {
  static const Isa isa = [] {
    const Isa best = best_isa();
    const char* wanted = std::getenv("XATTN_ISA");
    if (wanted == nullptr) return best;
    for (const Isa each : {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16}) {
      if (each <= best && std::strcmp(wanted, isa_name(each)) == 0) return each;
    }
    return best;
  }();
  return isa;
}

}  // namespace xattn

static PyObject* isa(PyObject*, PyObject*) {
  return PyUnicode_FromString(xattn::isa_name(xattn::active_isa()));
}

static PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS, "Name of the instruction set whose kernels run."},
    {nullptr, nullptr, 0, nullptr},
};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "CPU kernels of xattn_ops.", -1, methods};

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
