// Which of its three variants a file is being compiled as.
#pragma once

#ifndef TH_LEVEL
#error "compile with -DTH_LEVEL=2 (AVX-512), 1 (AVX2) or 0 (scalar)"
#endif
#if TH_LEVEL == 2
#define TH_ISA avx512
#elif TH_LEVEL == 1
#define TH_ISA avx2
#else
#define TH_ISA scalar
#endif
