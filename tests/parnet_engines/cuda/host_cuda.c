/* A driver library of CUDA without a GPU, for NVIDIA's bindings to call.

   It has what the interpreter uses, and does at once, in host memory, what a GPU would do
   later: in an order that CUDA allows. It refuses what CUDA refuses: a missing context, a
   stream of another device, waiting in a capture for what lies outside and the other way
   round, waiting for a captured stream, memory taken or given back meanwhile.
   HOST_CUDA_NO_PEERS and HOST_CUDA_NO_JOINT_GRAPHS take abilities away. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { GPUS = 3, LEGACY = 1, PER_THREAD = 2, MAX = 4096 };
enum {
    OK = 0, INVALID_VALUE = 1, INVALID_CONTEXT = 201, PEERS_ALREADY = 704, INVALID_HANDLE = 400,
    NOT_FOUND = 500, UNSUPPORTED = 900, INVALIDATED = 901, ISOLATION = 905, CAPTURED = 907
};
enum { DEVICE = 2, HOST = 1 };

typedef struct Graph Graph;
typedef struct { int device; Graph *capture; } Stream;
typedef struct { int device, timing; uint64_t capture; double time_ms; } Event;
typedef struct { void *to; const void *from; size_t bytes; Event *event; } Op;
struct Graph { Stream *lead; uint64_t capture; int valid, count; Op ops[MAX]; };
typedef struct { char *at; size_t bytes; int device; } Block;

static __thread int stack[64], depth;
static int retained[GPUS], enabled[GPUS][GPUS];
static Stream *streams[MAX];
static Block blocks[MAX];
static int events, graphs, executables;
static uint64_t captures; /* all that have begun, each with its number */
static double now_ms;

int host_cuda_alive(void) {
    int count = events + graphs + executables + depth;
    for (int i = 0; i < GPUS; i++) count += retained[i];
    for (int i = 0; i < MAX; i++) count += (streams[i] != NULL) + (blocks[i].at != NULL);
    return count;
}

static int current(void) { return depth ? stack[depth - 1] : -1; }
static uintptr_t context_of(int device) { return 0x1000 + 16 * device; }
static int device_of(uintptr_t context) { return (int)(context - 0x1000) / 16; }
static int is_default(Stream *s) { return (uintptr_t)s == LEGACY || (uintptr_t)s == PER_THREAD; }

static void perform(Op *op) {
    if (op->event) op->event->time_ms = now_ms += 0.25;
    else if (op->from) memmove(op->to, op->from, op->bytes);
    else memset(op->to, 0, op->bytes);
}

static int enqueue(Stream *s, Op op) {
    if (!depth) return INVALID_CONTEXT;
    if (is_default(s)) { perform(&op); return OK; }
    if (s->device != current()) return INVALID_HANDLE;
    if (!s->capture) { perform(&op); return OK; }
    if (!s->capture->valid || s->capture->count == MAX) return INVALIDATED;
    s->capture->ops[s->capture->count++] = op;
    return OK;
}

static int init(unsigned flags) { (void)flags; return OK; }
static int get_count(int *n) { *n = GPUS; return OK; }
static int get_device(int *device, int ordinal) {
    if (ordinal < 0 || ordinal >= GPUS) return 101;
    *device = ordinal;
    return OK;
}
static int get_name(char *name, int length, int device) {
    strncpy(name, device ? "Host GPU, another" : "Host GPU", length);
    return OK;
}
static int get_attribute(int *value, int attribute, int device) {
    (void)device;
    *value = attribute == 75 ? 9 : 0; /* compute capability 9.0 */
    return OK;
}
static int get_bus_id(char *id, int length, int device) {
    if (device == 1) return INVALID_VALUE; /* a GPU that lies on no bus */
    snprintf(id, length, "0000:%02X:00.0", 0x3B - device);
    return OK;
}
static int total_memory(size_t *bytes, int device) { (void)device; *bytes = 1ul << 33; return OK; }
static int memory_info(size_t *unused, size_t *total) {
    *unused = *total = 1ul << 33;
    for (int i = 0; i < MAX; i++)
        if (blocks[i].at && blocks[i].device == current()) *unused -= blocks[i].bytes;
    return depth ? OK : INVALID_CONTEXT;
}
static int retain(uintptr_t *context, int device) {
    retained[device]++;
    *context = context_of(device);
    return OK;
}
static int release(int device) { return retained[device]-- > 0 ? OK : INVALID_CONTEXT; }
static int push(uintptr_t context) { stack[depth++] = device_of(context); return OK; }
static int set(uintptr_t context) {
    if (depth) stack[depth - 1] = device_of(context);
    else push(context);
    return OK;
}
static int pop(uintptr_t *context) {
    if (!depth) return INVALID_CONTEXT;
    *context = context_of(stack[--depth]);
    return OK;
}
static int can_access(int *answer, int device, int peer) {
    *answer = device != peer && !getenv("HOST_CUDA_NO_PEERS");
    return OK;
}
static int enable_peer(uintptr_t context, unsigned flags) {
    (void)flags;
    if (!depth) return INVALID_CONTEXT;
    return enabled[current()][device_of(context)]++ ? PEERS_ALREADY : OK;
}
static int priorities(int *least, int *greatest) {
    if (!depth) return INVALID_CONTEXT;
    *least = 0;
    *greatest = -5;
    return OK;
}
static int create_stream(Stream **s, unsigned flags, int priority) {
    if (!depth || flags != 1 || priority > 0 || priority < -5) return INVALID_VALUE;
    *s = calloc(1, sizeof **s);
    (*s)->device = current();
    for (int i = 0; i < MAX; i++) if (!streams[i]) { streams[i] = *s; break; }
    return OK;
}
static int destroy_stream(Stream *s) {
    for (int i = 0; i < MAX; i++) if (streams[i] == s) { streams[i] = NULL; free(s); return OK; }
    return INVALID_HANDLE;
}
static int stream_context(Stream *s, uintptr_t *context) {
    *context = context_of(s->device);
    return OK;
}
static int create_event(Event **e, unsigned flags) {
    if (!depth) return INVALID_CONTEXT;
    *e = calloc(1, sizeof **e);
    (*e)->device = current();
    (*e)->timing = !(flags & 2);
    events++;
    return OK;
}
static int destroy_event(Event *e) { events--; free(e); return OK; }
static int record(Event *e, Stream *s) {
    if (!depth) return INVALID_CONTEXT;
    if (!is_default(s) && s->device != e->device) return INVALID_HANDLE;
    e->capture = is_default(s) || !s->capture ? 0 : s->capture->capture;
    if (!e->capture) e->time_ms = now_ms += 0.25;
    return OK;
}
static int record_with_flags(Event *e, Stream *s, unsigned flags) {
    if (!(flags & 1)) return record(e, s);
    if (is_default(s) || !s->capture) return 401;
    return enqueue(s, (Op){.event = e});
}
/* A capture that has not ended: the one of this number, or any if there is none. */
static Graph *open_capture(uint64_t capture) {
    for (int i = 0; i < MAX; i++)
        if (streams[i] && streams[i]->capture)
            if (!capture || streams[i]->capture->capture == capture) return streams[i]->capture;
    return NULL;
}
static int wait_event(Stream *s, Event *e, unsigned flags) {
    (void)flags;
    if (!depth) return INVALID_CONTEXT;
    if (is_default(s)) return e->capture ? ISOLATION : OK;
    if (!e->capture && !s->capture) return OK;
    Graph *awaited = e->capture ? open_capture(e->capture) : NULL;
    if (!awaited && !s->capture) return CAPTURED;
    if (!awaited || (s->capture && s->capture != awaited)) {
        s->capture->valid = 0;
        return ISOLATION;
    }
    if (s->device != awaited->lead->device && getenv("HOST_CUDA_NO_JOINT_GRAPHS")) {
        awaited->valid = 0;
        return UNSUPPORTED;
    }
    s->capture = awaited;
    return OK;
}
static int elapsed(float *ms, Event *from, Event *to) {
    if (!from->timing || !to->timing) return INVALID_HANDLE;
    if (from->capture || to->capture) return CAPTURED;
    *ms = (float)(to->time_ms - from->time_ms);
    return OK;
}
static int require_no_capture(void) {
    Graph *found = open_capture(0);
    if (found) found->valid = 0;
    return found ? UNSUPPORTED : OK;
}
static int take(uintptr_t *at, size_t bytes, int device) {
    if (!depth || !bytes) return INVALID_VALUE;
    if (require_no_capture()) return UNSUPPORTED;
    for (int i = 0; i < MAX; i++)
        if (!blocks[i].at) {
            blocks[i] = (Block){aligned_alloc(256, (bytes + 255) / 256 * 256), bytes, device};
            *at = (uintptr_t)blocks[i].at;
            return OK;
        }
    return 2;
}
static int give_back(char *at) {
    if (require_no_capture()) return UNSUPPORTED;
    for (int i = 0; i < MAX; i++)
        if (blocks[i].at == at) { free(at); blocks[i].at = NULL; return OK; }
    return INVALID_VALUE;
}
static int allocate(uintptr_t *at, size_t bytes) { return take(at, bytes, current()); }
static int allocate_host(uintptr_t *at, size_t bytes, unsigned flags) {
    return flags == 1 ? take(at, bytes, -1) : INVALID_VALUE;
}
static int copy(void *to, const void *from, size_t bytes, Stream *s) {
    return enqueue(s, (Op){to, from, bytes, NULL});
}
static int clear(void *at, unsigned char value, size_t bytes, Stream *s) {
    return value ? INVALID_VALUE : enqueue(s, (Op){at, NULL, bytes, NULL});
}
static int begin_capture(Stream *s, int mode) {
    if (mode != 1 || is_default(s) || s->capture) return 401;
    s->capture = calloc(1, sizeof(Graph));
    s->capture->lead = s;
    s->capture->capture = ++captures;
    s->capture->valid = 1;
    return OK;
}
static int end_capture(Stream *s, Graph **g) {
    Graph *found = s->capture;
    *g = NULL;
    if (!found || found->lead != s) return 401;
    for (int i = 0; i < MAX; i++)
        if (streams[i] && streams[i]->capture == found) streams[i]->capture = NULL;
    if (!found->valid) { free(found); return INVALIDATED; }
    *g = found;
    graphs++;
    return OK;
}
static int is_capturing(Stream *s, int *status) {
    *status = !s->capture ? 0 : s->capture->valid ? 1 : 2;
    return OK;
}
static int instantiate(Graph **executable, Graph *g, unsigned long long flags) {
    if (flags != 8) return INVALID_VALUE;
    *executable = memcpy(malloc(sizeof *g), g, sizeof *g);
    executables++;
    return OK;
}
static int destroy_graph(Graph *g) { graphs--; free(g); return OK; }
static int destroy_executable(Graph *g) { executables--; free(g); return OK; }
static int launch(Graph *g, Stream *s) {
    if (current() != s->device) return INVALID_CONTEXT;
    for (int i = 0; i < g->count; i++) perform(&g->ops[i]);
    return OK;
}
static int synchronize(Stream *s) {
    if (!depth) return INVALID_CONTEXT;
    if (!s->capture) return OK;
    s->capture->valid = 0;
    return UNSUPPORTED;
}
static int attribute_of(void *value, int attribute, char *at) {
    for (int i = 0; i < MAX; i++)
        if (blocks[i].at && blocks[i].at <= at && at < blocks[i].at + blocks[i].bytes) {
            int device = blocks[i].device;
            if (attribute == 1) *(uintptr_t *)value = context_of(device);
            else if (attribute == 2) *(unsigned *)value = device < 0 ? HOST : DEVICE;
            else if (attribute == 9) *(int *)value = device;
            else return INVALID_VALUE;
            return OK;
        }
    return INVALID_VALUE;
}
static int error_string(int error, const char **text) {
    (void)error;
    *text = "as the stand-in for the driver says";
    return OK;
}

static const struct { const char *name; void *function; } table[] = {
    {"cuInit", init}, {"cuDeviceGetCount", get_count}, {"cuDeviceGet", get_device},
    {"cuDeviceGetName", get_name}, {"cuDeviceGetAttribute", get_attribute},
    {"cuDeviceGetPCIBusId", get_bus_id}, {"cuDeviceTotalMem", total_memory},
    {"cuMemGetInfo", memory_info},
    {"cuDevicePrimaryCtxRetain", retain},
    {"cuDevicePrimaryCtxRelease", release}, {"cuCtxPushCurrent", push}, {"cuCtxSetCurrent", set},
    {"cuCtxPopCurrent", pop}, {"cuDeviceCanAccessPeer", can_access},
    {"cuCtxEnablePeerAccess", enable_peer}, {"cuCtxGetStreamPriorityRange", priorities},
    {"cuStreamCreateWithPriority", create_stream}, {"cuStreamDestroy", destroy_stream},
    {"cuStreamGetCtx", stream_context}, {"cuEventCreate", create_event},
    {"cuEventDestroy", destroy_event}, {"cuEventRecord", record},
    {"cuEventRecordWithFlags", record_with_flags}, {"cuStreamWaitEvent", wait_event},
    {"cuEventElapsedTime", elapsed}, {"cuMemAlloc", allocate}, {"cuMemFree", give_back},
    {"cuMemHostAlloc", allocate_host}, {"cuMemFreeHost", give_back},
    {"cuMemcpyHtoDAsync", copy}, {"cuMemcpyDtoHAsync", copy}, {"cuMemcpyDtoDAsync", copy},
    {"cuMemcpyAsync", copy}, {"cuMemsetD8Async", clear}, {"cuStreamBeginCapture", begin_capture},
    {"cuStreamEndCapture", end_capture}, {"cuStreamIsCapturing", is_capturing},
    {"cuGraphInstantiateWithFlags", instantiate}, {"cuGraphDestroy", destroy_graph},
    {"cuGraphExecDestroy", destroy_executable}, {"cuGraphLaunch", launch},
    {"cuStreamSynchronize", synchronize}, {"cuStreamQuery", synchronize},
    {"cuPointerGetAttribute", attribute_of}, {"cuGetErrorString", error_string},
};

int cuGetProcAddress_v2(
    const char *name, void **function, int version, uint64_t flags, int *status
) {
    (void)version;
    (void)flags;
    *function = NULL;
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (!strcmp(name, table[i].name)) *function = table[i].function;
    if (status) *status = *function ? 0 : 1;
    return *function ? OK : NOT_FOUND;
}
