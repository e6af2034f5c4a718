// The kernels without machine flags: every x86-64, aarch64 and others.
#define KV_QUERY_TILE 2
#define KV_TABLE generic_kernels
#define KV_NAME "generic"
#include "table.h"
