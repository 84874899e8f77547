// The Python module that carries the CUDA kernels. Loading it registers them (csrc/*/*_cuda.cu)
// under the schemas of library.cpp; it is loaded under a CUDA torch alone.
#include <Python.h>

// A version of CUDA as CUDA gives it, 13000 for 13.0; 0 where there is none.
template <cudaError_t (*kGet)(int*)>
static PyObject* version(PyObject*, PyObject*) {
  int value = 0;
  if (kGet(&value) != cudaSuccess) value = 0;
  return PyLong_FromLong(value);
}

static PyMethodDef methods[] = {
    {"toolkit", version<cudaRuntimeGetVersion>, METH_NOARGS, "The CUDA that the kernels are of."},
    {"driver", version<cudaDriverGetVersion>, METH_NOARGS, "The newest CUDA that the driver runs."},
    {nullptr, nullptr, 0, nullptr},
};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", "CUDA kernels of xattn_ops.", -1,
                             methods};

PyMODINIT_FUNC PyInit__C_cuda() { return PyModule_Create(&module); }
