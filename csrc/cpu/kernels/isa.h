#pragma once
#include <string>
#include <utility>
#include <vector>

namespace shear::cpu {

// Every compiled instruction set, best first, and whether this machine supports it.
std::vector<std::pair<std::string, bool>> instruction_sets();

}  // namespace shear::cpu
