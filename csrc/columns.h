// Rows of tables that C++ and Python both read. The fields are listed once, as a macro: they make
// the struct, and the names that shear_ops._C.COLUMNS has in the same order.
#pragma once
#include <cstdint>

#define SHEAR_FIELD(name) int64_t name;
#define SHEAR_NAME(name) #name,
