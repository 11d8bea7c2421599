// Keeps the library loadable on old Linux systems (glibc 2.27, libstdc++ of GCC 8), whatever compiler builds it.
//
// A compiler emits references to the newest version of each symbol it knows. A reference to a symbol that is newer
// than the user's system makes the loader refuse the whole library. Each definition below replaces such a reference
// with local code that needs only old symbols. `make wheel` checks the result with auditwheel.
//
// Linking libstdc++ statically is no alternative: our exceptions are caught inside libtorch_cpu.so, so both must share
// one C++ runtime.
#include <sstream>

#if defined(__linux__) && defined(__x86_64__) && defined(__GLIBC__) && defined(__GLIBCXX__)

// libstdc++ exports these members since GCC 9 (constructors) and GCC 11 (str). Older ones expect them inlined.
#if _GLIBCXX_RELEASE >= 9
template std::basic_stringstream<char>::basic_stringstream();
template std::basic_ostringstream<char>::basic_ostringstream();
#endif
#if _GLIBCXX_RELEASE >= 11 && __cplusplus >= 202002L
template std::string std::basic_stringbuf<char>::str() const&;
template std::string std::basic_stringbuf<char>::str() &&;
#endif

#define HIDDEN __attribute__((visibility("hidden")))

extern "C" {

// glibc 2.32: whether the process has one thread, in which case shared_ptr counts without atomic instructions.
HIDDEN char __libc_single_threaded = 0;

// glibc 2.29 has versions of exp and log without System V error handling. The first versions return the same values.
double first_exp(double) __asm__("first_exp");
double first_log(double) __asm__("first_log");
__asm__(".symver first_exp, exp@GLIBC_2.2.5");
__asm__(".symver first_log, log@GLIBC_2.2.5");
HIDDEN double local_exp(double) __asm__("exp");
HIDDEN double local_log(double) __asm__("log");
double local_exp(double x) { return first_exp(x); }
double local_log(double x) { return first_log(x); }

}  // extern "C"

#endif
