// The kernels of one instruction set: the including file names them and the build sets its machine flags.
#pragma once

#include "columns.h"
#include "encode.h"
#include "range.h"

namespace kvbudget {

const Kernels& KV_TABLE() {
  static const Kernels kernels{KV_NAME, scratch_bytes, attend, mass, mass_of_logits, column_bytes, columns, encode_tokens, encode_units};
  return kernels;
}

}  // namespace kvbudget
