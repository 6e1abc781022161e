// A team runs in PyTorch's own OpenMP threads where it has them (`regard_use_openmp`): a second pool
// beside it would wait for cores on which the first still spins. In a forked child those threads no
// longer exist, so there, and where there is no OpenMP, a call starts threads of its own.
#include "team.h"

#include <system_error>
#include <thread>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace regard {

typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);
static std::atomic<Parallel> openmp{nullptr};

static void forget() { openmp = nullptr; }

void use_openmp(void* parallel) {
    openmp = (Parallel)parallel;
#if defined(__unix__) || defined(__APPLE__)
    static bool watching = pthread_atfork(nullptr, nullptr, forget) == 0;
    if (!watching) forget();
#endif
}

void run_team(long threads, void (*work)(void*), void* data) {
    if (threads <= 1) return work(data);
    if (Parallel parallel = openmp) return parallel(work, data, (unsigned)threads, 0);
    constexpr long MOST = 256;
    std::thread others[MOST];
    long count = threads - 1 < MOST ? threads - 1 : MOST;
    long started = 0;
    try {
        for (; started < count; started++) others[started] = std::thread(work, data);
    } catch (const std::system_error&) {
        // The system starts no more: those that there are take all the items
    }
    work(data);
    for (long i = 0; i < started; i++) others[i].join();
}

}  // namespace regard
