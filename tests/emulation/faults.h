#pragma once

#include <string>
#include <vector>

namespace faults {

constexpr int kInputs = 256, kOutputs = 64;  // floats that a fault's kernel reads and writes

std::vector<std::string> names();
void run(const std::string& name, const float* in, float* out, bool planted);

}  // namespace faults
