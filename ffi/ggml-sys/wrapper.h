/* What bindgen reads: the ggml interfaces that the engine uses. */
#include "ggml.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
