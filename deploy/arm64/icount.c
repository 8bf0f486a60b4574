/* QEMU plugin: counts guest instructions and notes the count at every guest getpriority(which, tag) call, so Python
   brackets a region with os.getpriority(os.PRIO_PROCESS, tag) and ignores the OSError. Writes "mark TAG COUNT" and
   "total COUNT" lines to the file named by ICOUNT_OUT. One guest thread only.
   Plugin interface version 1 (QEMU 7.2), declared by hand: Debian 12 ships no qemu-plugin.h. */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define EXPORT __attribute__((visibility("default")))
#define GETPRIORITY 141 /* aarch64 */

typedef uint64_t plugin_id;
struct qemu_plugin_tb;
typedef void (*block_cb)(plugin_id, struct qemu_plugin_tb *);
typedef void (*exit_cb)(plugin_id, void *);
typedef void (*syscall_cb)(plugin_id, unsigned cpu, int64_t number, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                           uint64_t, uint64_t, uint64_t);
enum qemu_plugin_op { QEMU_PLUGIN_INLINE_ADD_U64 };

size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, enum qemu_plugin_op, void *, uint64_t);
void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, block_cb);
void qemu_plugin_register_vcpu_syscall_cb(plugin_id, syscall_cb);
void qemu_plugin_register_atexit_cb(plugin_id, exit_cb, void *);

EXPORT int qemu_plugin_version = 1;
static uint64_t count;
static FILE *out;

static void on_block(plugin_id id, struct qemu_plugin_tb *block) {
    qemu_plugin_register_vcpu_tb_exec_inline(block, QEMU_PLUGIN_INLINE_ADD_U64, &count, qemu_plugin_tb_n_insns(block));
}

static void on_syscall(plugin_id id, unsigned cpu, int64_t number, uint64_t which, uint64_t tag, uint64_t c, uint64_t d,
                       uint64_t e, uint64_t f, uint64_t g, uint64_t h) {
    if (number == GETPRIORITY) {
        fprintf(out, "mark %llu %llu\n", (unsigned long long)tag, (unsigned long long)count);
        fflush(out);
    }
}

static void on_exit_(plugin_id id, void *unused) {
    fprintf(out, "total %llu\n", (unsigned long long)count);
    fflush(out);
}

EXPORT int qemu_plugin_install(plugin_id id, const void *info, int argc, char **argv) {
    const char *path = getenv("ICOUNT_OUT");
    out = path ? fopen(path, "a") : NULL;
    if (!out) out = stderr;
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_block);
    qemu_plugin_register_vcpu_syscall_cb(id, on_syscall);
    qemu_plugin_register_atexit_cb(id, on_exit_, NULL);
    return 0;
}
