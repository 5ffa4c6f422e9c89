// For files compiled once per instruction set: FASTVLP_ISA names the set, and the table of kernels
// that such a file exports carries the name.
#pragma once

#ifndef FASTVLP_ISA
#error "define FASTVLP_ISA"
#endif
#define FASTVLP_JOIN_(a, b) a##b
#define FASTVLP_JOIN(a, b) FASTVLP_JOIN_(a, b)
