// What the tests set from outside.
#include "cuda_words.h"

extern "C" __attribute__((visibility("default"))) void shear_emulated_order(int order) {
  emulated::order = order;
}
