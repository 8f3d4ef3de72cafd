// Memory barriers between processes that share an arena. Written out because ThreadSanitizer
// refuses std::atomic_thread_fence, and because streaming stores need more than C++ promises.
#pragma once

namespace everstep::checkpoint {

// Every store before it, streaming ones too, is seen before every store after it.
inline void StoreFence() {
#if defined(__x86_64__)
  asm volatile("sfence" ::: "memory");
#elif defined(__aarch64__)
  asm volatile("dmb ish" ::: "memory");
#else
  __sync_synchronize();
#endif
}

// Every load before it happens before every load after it.
inline void LoadFence() {
#if defined(__x86_64__)
  asm volatile("" ::: "memory");  // the processor keeps loads in order
#elif defined(__aarch64__)
  asm volatile("dmb ishld" ::: "memory");
#else
  __sync_synchronize();
#endif
}

}  // namespace everstep::checkpoint
