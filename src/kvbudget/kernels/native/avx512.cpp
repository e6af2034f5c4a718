// The kernels for avx512 machines; the build sets the matching machine flags for this file alone.
#define KV_TABLE avx512_kernels
#define KV_NAME "avx512"
#include "table.h"
