// The instruction sets whose kernels were compiled, and the choice among them. Knows no Python.
#pragma once
#include <vector>

#include "kernels.h"

namespace ihvp {

struct Choice {
    const Kernels* kernels;
    bool runs_here;
    bool pays_here = true;  // else it is only taken by name
};

// Best first.
std::vector<Choice> compiled();

// The one of this name, or the best that pays for null; throws std::invalid_argument where this processor does not run
// it.
const Kernels* select_isa(const char* wanted);

}  // namespace ihvp
