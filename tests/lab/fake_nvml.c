/* A libnvidia-ml.so.1 without a GPU, told by the variable FAKE_NVML what to pretend:
 *
 *     FAKE_NVML="gpus=8 *.links=18 3.lost=1 5.uncorrected=2"
 *
 * `N.key=value` speaks of GPU N, `*.key=value` of every GPU without a word of its own, `key=value` of the system.
 * With -DOLD the functions that came with newer drivers are left out.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef void *device; /* index + 1 */
enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, LOST = 15 };

static long told(const char *start, const char *key, long otherwise) {
    char wanted[64];
    const char *at = getenv("FAKE_NVML");
    size_t length = snprintf(wanted, sizeof wanted, "%s%s=", start, key);
    for (; at && *at; at = strchr(at, ' ') ? strchr(at, ' ') + 1 : NULL)
        if (!strncmp(at, wanted, length)) return strtol(at + length, NULL, 0);
    return otherwise;
}

static long of(device d, const char *key, long otherwise) {
    char start[24];
    snprintf(start, sizeof start, "%ld.", (long)d - 1);
    return told(start, key, told("*.", key, otherwise));
}

/* Every question to a GPU begins so: a lost one answers nothing, a stuck one never. */
static int answers(device d) {
    while (of(d, "stuck", 0)) sleep(1);
    return of(d, "lost", 0) ? (int)of(d, "code", LOST) : SUCCESS;
}
#define ASK(d) do { int code = answers(d); if (code) return code; } while (0)
#define HAVE(d, key) do { if (of(d, key, -1) < 0) return NOT_SUPPORTED; } while (0)

int nvmlInitWithFlags(unsigned flags) { (void)flags; return (int)told("", "init", SUCCESS); }
int nvmlInit_v2(void) { return (int)told("", "init", SUCCESS); }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) { return code == LOST ? "GPU is lost" : "an error"; }

int nvmlSystemGetDriverVersion(char *out, unsigned size) {
    snprintf(out, size, "%ld.54.15", told("", "driver", 550));
    return SUCCESS;
}
int nvmlSystemGetCudaDriverVersion(int *out) { *out = 12040; return SUCCESS; }
int nvmlDeviceGetCount_v2(unsigned *out) { *out = (unsigned)told("", "gpus", 8); return SUCCESS; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, device *out) {
    *out = (device)(long)(index + 1);
    return of(*out, "lost", 0) && of(*out, "early", 0) ? LOST : SUCCESS;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, device *out) {
    long index;
    if (sscanf(uuid, "GPU-fake-%ld", &index) != 1 || index < 0 || index >= told("", "gpus", 8)) return NOT_FOUND;
    *out = (device)(index + 1);
    return SUCCESS;
}
int nvmlDeviceGetName(device d, char *out, unsigned size) {
    snprintf(out, size, of(d, "kind", 0) ? "NVIDIA A100-SXM4-40GB" : "NVIDIA H100 80GB HBM3");
    return SUCCESS;
}
int nvmlDeviceGetUUID(device d, char *out, unsigned size) {
    ASK(d);
    snprintf(out, size, "GPU-fake-%ld", (long)d - 1);
    return SUCCESS;
}

struct memory { unsigned long long total, free, used; };
int nvmlDeviceGetMemoryInfo(device d, struct memory *out) {
    ASK(d);
    out->total = 85899345920ULL;
    out->used = (unsigned long long)of(d, "used", 1 << 20);
    out->free = out->total - out->used;
    return SUCCESS;
}

struct rates { unsigned gpu, memory; };
int nvmlDeviceGetUtilizationRates(device d, struct rates *out) {
    ASK(d);
    HAVE(d, "busy");
    out->gpu = (unsigned)of(d, "busy", 0);
    out->memory = 0;
    return SUCCESS;
}
int nvmlDeviceGetPowerUsage(device d, unsigned *out) {
    ASK(d);
    HAVE(d, "milliwatts");
    *out = (unsigned)of(d, "milliwatts", 0);
    return SUCCESS;
}

int nvmlDeviceGetTemperature(device d, int sensor, unsigned *out) {
    (void)sensor;
    ASK(d);
    *out = (unsigned)of(d, "temperature", 35 + (long)d);
    return SUCCESS;
}
int nvmlDeviceGetTemperatureThreshold(device d, int kind, unsigned *out) {
    (void)kind;
    ASK(d);
    *out = 90;
    return SUCCESS;
}
int nvmlDeviceGetClockInfo(device d, int kind, unsigned *out) { (void)kind; ASK(d); *out = (unsigned)of(d, "clock", 1980); return SUCCESS; }
int nvmlDeviceGetMaxClockInfo(device d, int kind, unsigned *out) { (void)kind; ASK(d); *out = 1980; return SUCCESS; }

int nvmlDeviceGetEccMode(device d, int *now, int *pending) { ASK(d); *now = *pending = (int)of(d, "ecc", 1); return SUCCESS; }
int nvmlDeviceGetTotalEccErrors(device d, int type, int counter, unsigned long long *out) {
    ASK(d);
    *out = (unsigned long long)(type ? of(d, "uncorrected", 0) : counter ? 0 : of(d, "corrected", 0));
    return SUCCESS;
}

/* Called first for the number of pages, then for the pages. */
int nvmlDeviceGetRetiredPages(device d, int cause, unsigned *count, unsigned long long *pages) {
    unsigned have = (unsigned)(cause ? of(d, "retired", -1) : 0);
    ASK(d);
    HAVE(d, "retired");
    if (*count < have || (have && !pages)) { *count = have; return INSUFFICIENT_SIZE; }
    for (unsigned i = 0; i < have; i++) pages[i] = 4096ULL * i;
    *count = have;
    return SUCCESS;
}
int nvmlDeviceGetRetiredPagesPendingStatus(device d, int *out) {
    ASK(d);
    HAVE(d, "retired");
    *out = (int)of(d, "pending", 0);
    return SUCCESS;
}

int nvmlDeviceGetCurrPcieLinkWidth(device d, unsigned *out) { ASK(d); *out = (unsigned)of(d, "lanes", 16); return SUCCESS; }
int nvmlDeviceGetMaxPcieLinkWidth(device d, unsigned *out) { ASK(d); *out = 16; return SUCCESS; }
int nvmlDeviceGetTopologyCommonAncestor(device a, device b, int *out) {
    ASK(a);
    ASK(b);
    *out = ((long)a - 1) / 4 == ((long)b - 1) / 4 ? 40 : 50;
    return SUCCESS;
}

#ifndef OLD
struct pci { char legacy[16]; unsigned domain, bus, slot, id, subsystem; char bus_id[32]; };
static void fill(struct pci *out, long index) {
    memset(out, 0, sizeof *out);
    snprintf(out->bus_id, sizeof out->bus_id, "00000000:%02lX:00.0", 0x3a + index);
}
int nvmlDeviceGetPciInfo_v3(device d, struct pci *out) { ASK(d); fill(out, (long)d - 1); return SUCCESS; }
int nvmlDeviceGetCurrPcieLinkGeneration(device d, unsigned *out) { ASK(d); *out = 5; return SUCCESS; }
int nvmlDeviceGetMaxPcieLinkGeneration(device d, unsigned *out) { ASK(d); *out = 5; return SUCCESS; }
int nvmlDeviceGetCurrentClocksEventReasons(device d, unsigned long long *out) {
    ASK(d);
    *out = (unsigned long long)of(d, "slowed", 1);
    return SUCCESS;
}
int nvmlDeviceGetRemappedRows(device d, unsigned *good, unsigned *bad, unsigned *pending, unsigned *failed) {
    ASK(d);
    *good = 0;
    *bad = (unsigned)of(d, "rows", 0);
    *pending = (unsigned)of(d, "rows_pending", 0);
    *failed = (unsigned)of(d, "rows_failed", 0);
    return SUCCESS;
}

struct value { unsigned id, scope; long long time, spent; int type, code; unsigned long long value; };
int nvmlDeviceGetFieldValues(device d, int count, struct value *out) {
    ASK(d);
    for (int i = 0; i < count; i++) {
        long action = of(d, "recovery", -1);
        out[i].code = out[i].id == 230 && action >= 0 ? SUCCESS : NOT_SUPPORTED;
        out[i].value = (unsigned long long)(action < 0 ? 0 : action);
    }
    return SUCCESS;
}

/* links: to a switch, as on boards with 8 GPUs; mesh: as many links to every other GPU, as on older boards. */
static long peers(device d) { return of(d, "mesh", 0) * (told("", "gpus", 8) - 1); }
int nvmlDeviceGetNvLinkState(device d, unsigned link, unsigned *out) {
    ASK(d);
    if (link >= of(d, "links", 0) + peers(d)) return INVALID_ARGUMENT;
    *out = (long)link >= of(d, "down", 0);
    return SUCCESS;
}
int nvmlDeviceGetNvLinkRemoteDeviceType(device d, unsigned link, unsigned *out) {
    (void)link;
    ASK(d);
    *out = of(d, "mesh", 0) ? 0 : 2;
    return SUCCESS;
}
int nvmlDeviceGetNvLinkRemotePciInfo_v2(device d, unsigned link, struct pci *out) {
    long other = (long)link / of(d, "mesh", 1);
    ASK(d);
    fill(out, other < (long)d - 1 ? other : other + 1);
    return SUCCESS;
}

struct process { unsigned pid; unsigned long long used; unsigned instance, compute; };
int nvmlDeviceGetComputeRunningProcesses_v3(device d, unsigned *count, struct process *out) {
    unsigned have = (unsigned)of(d, "processes", 0);
    ASK(d);
    if (*count < have || (have && !out)) { *count = have; return INSUFFICIENT_SIZE; }
    for (unsigned i = 0; i < have; i++) { memset(&out[i], 0, sizeof out[i]); out[i].pid = 1000 + i; }
    *count = have;
    return SUCCESS;
}
#endif
