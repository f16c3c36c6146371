#include "check.hpp"

int main() { return less::testing::runAll(); }
