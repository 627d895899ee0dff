/* A GPU that does nothing: what stands below the CUDA build of torch when nobody has a card.

   Preloaded, these functions answer before libcudart, libcuda and cuBLAS do. Device memory is host memory that
   is reserved and hardly ever touched, with the limit of an 80 GB card; a kernel launch adds to a counter.
   What comes back from the device is zeros, so that two runs find the same. Functions that are not here, and
   that nobody needs an answer from, are stubs that return 0 (stubs.py).

   Not here: cuDNN and NCCL. Prototypes are those of CUDA 13. */

#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* Counters. counters.py reads them by the same order. */

enum {
    KERNELS, PRODUCTS, FLOP, TO_DEVICE, PAGEABLE, TO_HOST, ON_DEVICE, FILLS, SYNCS, ALLOCATIONS,
    TO_DEVICE_BYTES, TO_HOST_BYTES, ON_DEVICE_BYTES, NUM_COUNTERS
};
static long counters[NUM_COUNTERS];

long *null_counters(void) { return counters; }

static void count(int which, long amount) { __sync_fetch_and_add(&counters[which], amount); }

/* Launches by kernel: a hash table from the address of a kernel's host function to its name. */

#define NUM_SLOTS (1 << 16)
static struct { const void *kernel; const char *name; long launches, blocks; } slots[NUM_SLOTS];
static pthread_mutex_t slots_lock = PTHREAD_MUTEX_INITIALIZER;

static unsigned find_slot(const void *kernel) {
    unsigned i = ((unsigned long)kernel * 0x9E3779B97F4A7C15ul) >> 48;
    while (slots[i].kernel && slots[i].kernel != kernel) i = (i + 1) % NUM_SLOTS;
    return i;
}

static void name_kernel(const void *kernel, const char *name) {
    pthread_mutex_lock(&slots_lock);
    unsigned i = find_slot(kernel);
    slots[i].kernel = kernel;
    slots[i].name = name;
    pthread_mutex_unlock(&slots_lock);
}

/* Note a launch; `blocks` keeps the largest grid. */
static int launch(int which, const void *kernel, long blocks) {
    pthread_mutex_lock(&slots_lock);
    unsigned i = find_slot(kernel);
    slots[i].kernel = kernel;
    slots[i].launches++;
    if (blocks > slots[i].blocks) slots[i].blocks = blocks;
    pthread_mutex_unlock(&slots_lock);
    count(which, 1);
    return 0;
}

static long blocks_of(dim3 grid) { return (long)grid.x * grid.y * grid.z; }

/* A launch of what has no host function: kernels that Python stands in for. Names are kept, once each. */
void null_launch(const char *name, long blocks) {
    static struct { char *name; } known[NUM_SLOTS];
    unsigned i = 5381;
    for (const char *c = name; *c; c++) i = i * 33 + *c;
    for (i %= NUM_SLOTS; known[i].name && strcmp(known[i].name, name); i = (i + 1) % NUM_SLOTS);
    if (!known[i].name) {
        known[i].name = strdup(name);
        name_kernel(known[i].name, known[i].name);
    }
    launch(KERNELS, known[i].name, blocks);
}

void null_reset(void) {
    memset(counters, 0, sizeof counters);
    for (int i = 0; i < NUM_SLOTS; i++) slots[i].launches = slots[i].blocks = 0;
}

/* Write "launches TAB blocks TAB name" for every kernel launched since the reset; -1 where it cannot. */
int null_dump(const char *path) {
    FILE *file = fopen(path, "w");
    if (!file) return -1;
    for (int i = 0; i < NUM_SLOTS; i++)
        if (slots[i].launches)
            fprintf(file, "%ld\t%ld\t%s\n", slots[i].launches, slots[i].blocks, slots[i].name ? slots[i].name : "?");
    return fclose(file);
}

void __cudaRegisterFunction(void **module, const char *host, char *device, const char *name, int limit,
                            void *a, void *b, void *c, void *d, int *e) {
    void (*real)() = (void (*)())dlsym(RTLD_NEXT, "__cudaRegisterFunction");
    name_kernel(host, name);
    if (real) real(module, host, device, name, limit, a, b, c, d, e);
}

/* Memory. Ranges are few: torch allocates in blocks of 2 MB and more. */

#define MOST_RANGES 200000
#define PAGE 4096ul
#define LIMIT 84900000000ul    /* bytes that a driver leaves of an H100's 80 GiB */
#define COPIED (1ul << 16)     /* copies and fills above it are counted only: nobody reads what they would write */
#define FILLED (1ul << 20)
static struct { char *start; size_t size; int is_device; } ranges[MOST_RANGES];
static int num_ranges;
static size_t used;
static pthread_mutex_t ranges_lock = PTHREAD_MUTEX_INITIALIZER;

enum { PLAIN, PINNED, DEVICE };

static int kind_of(const void *pointer) {
    int kind = PLAIN;
    pthread_mutex_lock(&ranges_lock);
    for (int i = 0; i < num_ranges && kind == PLAIN; i++)
        if ((size_t)((char *)pointer - ranges[i].start) < ranges[i].size)
            kind = ranges[i].is_device ? DEVICE : PINNED;
    pthread_mutex_unlock(&ranges_lock);
    return kind;
}

static cudaError_t reserve(void **pointer, size_t size, int is_device) {
    size_t whole = (size + PAGE - 1) / PAGE * PAGE;
    if (is_device && used + whole > LIMIT) return cudaErrorMemoryAllocation;
    char *start = mmap(0, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED || num_ranges == MOST_RANGES) return cudaErrorMemoryAllocation;
    pthread_mutex_lock(&ranges_lock);
    ranges[num_ranges].start = start;
    ranges[num_ranges].is_device = is_device;
    ranges[num_ranges++].size = whole;
    if (is_device) used += whole;
    pthread_mutex_unlock(&ranges_lock);
    *pointer = start;
    return 0;
}

static cudaError_t release(void *pointer) {
    pthread_mutex_lock(&ranges_lock);
    for (int i = 0; i < num_ranges; i++)
        if (ranges[i].start == pointer) {
            munmap(pointer, ranges[i].size);
            if (ranges[i].is_device) used -= ranges[i].size;
            ranges[i] = ranges[--num_ranges];
            break;
        }
    pthread_mutex_unlock(&ranges_lock);
    return 0;
}

cudaError_t cudaMalloc(void **pointer, size_t size) {
    count(ALLOCATIONS, 1);
    return reserve(pointer, size, 1);
}
cudaError_t cudaFree(void *pointer) { return release(pointer); }
cudaError_t cudaHostAlloc(void **pointer, size_t size, unsigned flags) { return reserve(pointer, size, 0); }
cudaError_t cudaMallocHost(void **pointer, size_t size) { return reserve(pointer, size, 0); }
cudaError_t cudaFreeHost(void *pointer) { return release(pointer); }
cudaError_t cudaMemGetInfo(size_t *left, size_t *total) {
    *total = LIMIT;
    *left = LIMIT - used;
    return 0;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *pointer) {
    static const int types[] = {cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice};
    memset(found, 0, sizeof *found);
    found->type = types[kind_of(pointer)];
    found->devicePointer = (void *)pointer;
    found->hostPointer = (void *)pointer;
    return 0;
}

static cudaError_t copy(void *to, const void *from, size_t size) {
    int to_kind = kind_of(to), from_kind = kind_of(from);
    if (to_kind == DEVICE && from_kind == DEVICE) {
        count(ON_DEVICE, 1);
        count(ON_DEVICE_BYTES, size);
        if (size <= COPIED) memmove(to, from, size);
    } else if (to_kind == DEVICE) {
        count(TO_DEVICE, 1);
        count(TO_DEVICE_BYTES, size);
        if (from_kind == PLAIN) count(PAGEABLE, 1);
        memcpy(to, from, size);
    } else if (from_kind == DEVICE) {
        count(TO_HOST, 1);
        count(TO_HOST_BYTES, size);
        memset(to, 0, size);
    } else {
        memmove(to, from, size);
    }
    return 0;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    return copy(to, from, size);
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    count(SYNCS, 1);
    return copy(to, from, size);
}
cudaError_t cudaMemcpyPeerAsync(void *to, int a, const void *from, int b, size_t size, cudaStream_t stream) {
    return copy(to, from, size);
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
    count(ON_DEVICE, 1);
    count(ON_DEVICE_BYTES, width * height);
    return 0;
}
cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) {
    count(FILLS, 1);
    if (size <= FILLED) memset(to, value, size);
    return 0;
}
cudaError_t cudaMemset(void *to, int value, size_t size) { return cudaMemsetAsync(to, value, size, 0); }

/* The device: an H100 with 80 GB, by its data sheet. */

#define NAME "NVIDIA H100 80GB HBM3 (null)"
enum { NUM_SM = 132, L2_BYTES = 50 << 20, SM_SHARED = 228 << 10, BLOCK_SHARED = 227 << 10, REGISTERS = 1 << 16 };

static int attribute(int which) {
    switch (which) {
    case cudaDevAttrMaxThreadsPerBlock: case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 0x7fffffff;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 48 << 10;
    case cudaDevAttrTotalConstantMemory: return 64 << 10;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: return REGISTERS;
    case cudaDevAttrClockRate: return 1980000;        /* kHz */
    case cudaDevAttrTextureAlignment: return 512;
    case cudaDevAttrMultiProcessorCount: return NUM_SM;
    case cudaDevAttrMemoryClockRate: return 2619000;  /* kHz */
    case cudaDevAttrGlobalMemoryBusWidth: return 5120;
    case cudaDevAttrL2CacheSize: return L2_BYTES;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrComputeCapabilityMajor: return 9;
    case cudaDevAttrComputeCapabilityMinor: return 0;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return SM_SHARED;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return BLOCK_SHARED;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrReservedSharedMemoryPerBlock: return 1024;
    default: return 1;
    }
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
    memset(found, 0, sizeof *found);
    strcpy(found->name, NAME);
    found->totalGlobalMem = LIMIT;
    found->major = 9;
    found->warpSize = 32;
    found->multiProcessorCount = NUM_SM;
    found->l2CacheSize = L2_BYTES;
    found->sharedMemPerBlock = 48 << 10;
    found->sharedMemPerBlockOptin = BLOCK_SHARED;
    found->sharedMemPerMultiprocessor = SM_SHARED;
    found->reservedSharedMemPerBlock = 1024;
    found->regsPerBlock = found->regsPerMultiprocessor = REGISTERS;
    found->maxThreadsPerBlock = found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024;
    found->maxThreadsDim[2] = 64;
    found->maxThreadsPerMultiProcessor = 2048;
    found->maxBlocksPerMultiProcessor = 32;
    found->maxGridSize[0] = 0x7fffffff;
    found->maxGridSize[1] = found->maxGridSize[2] = 65535;
    found->memPitch = 0x7fffffff;
    found->totalConstMem = 64 << 10;
    found->textureAlignment = 512;
    found->memoryBusWidth = 5120;
    found->asyncEngineCount = 3;
    found->concurrentKernels = found->unifiedAddressing = found->managedMemory = 1;
    found->cooperativeLaunch = found->canMapHostMemory = 1;
    return 0;
}
cudaError_t cudaGetDeviceCount(int *n) { *n = 1; return 0; }
cudaError_t cudaGetDevice(int *n) { *n = 0; return 0; }
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int device) {
    *value = attribute(which);
    return 0;
}
cudaError_t cudaDeviceGetPCIBusId(char *text, int size, int device) { strncpy(text, "0000:01:00.0", size); return 0; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b) { *can = 0; return 0; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return 0; }
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return 0; }

/* Streams and events: work is done when it is given, but each wait of the host counts. */

static cudaError_t new_handle(void *handle) { *(void **)handle = malloc(16); return 0; }

cudaError_t cudaDeviceSynchronize(void) { count(SYNCS, 1); return 0; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { count(SYNCS, 1); return 0; }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { count(SYNCS, 1); return 0; }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) { *ms = 1.0f; return 0; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return new_handle(event); }
cudaError_t cudaEventCreate(cudaEvent_t *event) { return new_handle(event); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int p) { return new_handle(stream); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { return new_handle(stream); }
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return new_handle(stream); }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { *priority = 0; return 0; }
cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long *id) { *id = (unsigned long long)stream; return 0; }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    return 0;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status,
                                     unsigned long long *id, cudaGraph_t *graph, const cudaGraphNode_t **nodes,
                                     const cudaGraphEdgeData **edges, size_t *n) {
    *status = cudaStreamCaptureStatusNone;
    if (id) *id = 0;
    return 0;
}

/* Launches */

cudaError_t cudaLaunchKernel(const void *f, dim3 grid, dim3 b, void **args, size_t shared, cudaStream_t stream) {
    return launch(KERNELS, f, blocks_of(grid));
}
cudaError_t cudaLaunchCooperativeKernel(const void *f, dim3 grid, dim3 b, void **args, size_t shared,
                                        cudaStream_t stream) {
    return launch(KERNELS, f, blocks_of(grid));
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *f, void **args) {
    return launch(KERNELS, f, blocks_of(config->gridDim));
}
cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 grid, dim3 b, void **args, size_t shared, cudaStream_t stream) {
    return launch(KERNELS, f, blocks_of(grid));
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *f) { *kernel = (cudaKernel_t)f; return 0; }
cudaError_t cudaGetKernel(cudaKernel_t *kernel, const void *f) { *kernel = (cudaKernel_t)f; return 0; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int threads, size_t shared) {
    *n = 2;
    return 0;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int threads, size_t shared,
                                                                   unsigned flags) {
    *n = 2;
    return 0;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *f) {
    memset(found, 0, sizeof *found);
    found->maxThreadsPerBlock = 1024;
    found->numRegs = 32;
    found->binaryVersion = found->ptxVersion = 90;
    return 0;
}
static cudaError_t entry_point(const char *name, void **f, enum cudaDriverEntryPointQueryResult *result) {
    *f = dlsym(RTLD_DEFAULT, name);
    if (result) *result = *f ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return 0;
}
cudaError_t cudaGetDriverEntryPoint(const char *name, void **f, unsigned long long flags,
                                    enum cudaDriverEntryPointQueryResult *result) {
    return entry_point(name, f, result);
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
    return entry_point(name, f, result);
}

/* The driver, by the names that it exports. cuda.h would rename them, so types here are plain. */

#define CONTEXT ((void *)PAGE)

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = CUDART_VERSION; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
int cuDeviceGetCount(int *n) { *n = 1; return 0; }
int cuDeviceGetAttribute(int *value, int which, int device) { *value = attribute(which); return 0; }
int cuDeviceGetName(char *text, int size, int device) { strncpy(text, NAME, size); return 0; }
int cuCtxGetCurrent(void **context) { *context = CONTEXT; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = CONTEXT; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
int cuMemGetInfo_v2(size_t *left, size_t *total) { return cudaMemGetInfo(left, total); }
int cuPointerGetAttribute(void *value, int which, unsigned long pointer) { *(unsigned long *)value = pointer; return 0; }
int cuModuleLoadData(void **module, const void *image) { return new_handle(module); }
int cuModuleLoadDataEx(void **module, const void *image, unsigned n, void *a, void *b) { return new_handle(module); }
int cuLibraryLoadData(void **library, const void *code, void *a, void *b, unsigned n, void *c, void *d, unsigned m) {
    return new_handle(library);
}
int cuModuleGetFunction(void **f, void *module, const char *name) {
    new_handle(f);
    name_kernel(*f, strdup(name));
    return 0;
}
int cuFuncGetAttribute(int *value, int which, void *f) { *value = which ? 0 : 1024; return 0; }
int cuLaunchKernel(void *f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **args, void **extra) {
    return launch(KERNELS, f, (long)x * y * z);
}
int cuLaunchKernelEx(const unsigned *config, void *f, void **args, void **extra) {
    return launch(KERNELS, f, (long)config[0] * config[1] * config[2]); /* it begins with the grid's extents */
}
int cuOccupancyMaxActiveClusters(int *n, void *f, void *config) { *n = 16; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "error of the null GPU"; return 0; }
int cuGetErrorName(int error, const char **text) { *text = "null GPU"; return 0; }

/* cuBLAS: a product counts as one launch and its 2 m n k operations. Its headers need parts of a toolkit that no
   package brings, so types here are plain, too. */

enum { CUBLAS = 130100, BATCH_COUNT = 5 /* of cublasLtMatrixLayoutAttribute_t */ };

static int multiply(const char *name, long m, long n, long k, long batch) {
    count(FLOP, 2 * m * n * k * batch);
    null_launch(name, 0);
    count(KERNELS, -1);
    return count(PRODUCTS, 1), 0;
}

int cublasGemmEx(void *h, int ta, int tb, int m, int n, int k) { return multiply("cublasGemmEx", m, n, k, 1); }
int cublasGemmStridedBatchedEx(void *h, int ta, int tb, int m, int n, int k, const void *alpha, const void *A, int At,
                               int lda, long sa, const void *B, int Bt, int ldb, long sb, const void *beta, void *C,
                               int Ct, int ldc, long sc, int batch) {
    return multiply("cublasGemmStridedBatchedEx", m, n, k, batch);
}
#define PLAIN_PRODUCTS(letter)                                                                                        \
    int cublas##letter##gemm_v2(void *h, int ta, int tb, int m, int n, int k) {                                       \
        return multiply("cublas" #letter "gemm", m, n, k, 1);                                                         \
    }                                                                                                                 \
    int cublas##letter##gemmStridedBatched(void *h, int ta, int tb, int m, int n, int k, const void *alpha,           \
                                           const void *A, int lda, long sa, const void *B, int ldb, long sb,          \
                                           const void *beta, void *C, int ldc, long sc, int batch) {                  \
        return multiply("cublas" #letter "gemmStridedBatched", m, n, k, batch);                                       \
    }                                                                                                                 \
    int cublas##letter##gemv_v2(void *h, int t, int m, int n) { return multiply("cublas" #letter "gemv", m, n, 1, 1); }
PLAIN_PRODUCTS(S)
PLAIN_PRODUCTS(D)

struct layout { long rows, columns; int batch; };

int cublasLtMatrixLayoutCreate(struct layout **made, int type, unsigned long rows, unsigned long columns, long ld) {
    *made = malloc(sizeof **made);
    **made = (struct layout){rows, columns, 1};
    return 0;
}
int cublasLtMatrixLayoutSetAttribute(struct layout *layout, int which, const void *value, size_t size) {
    if (which == BATCH_COUNT) layout->batch = *(const int *)value;
    return 0;
}
int cublasLtMatrixLayoutDestroy(struct layout *layout) { free(layout); return 0; }
int cublasLtMatmulAlgoGetHeuristic(void *h, void *operation, struct layout *a, struct layout *b, struct layout *c,
                                   struct layout *d, void *preference, int wanted, void *found, int *n) {
    memset(found, 0, 64); /* an algorithm that needs no workspace */
    *n = 1;
    return 0;
}
/* A is M by K or its transpose, D is M by N. */
int cublasLtMatmul(void *h, void *operation, const void *alpha, const void *A, const struct layout *a, const void *B,
                   const struct layout *b, const void *beta, const void *C, const struct layout *c, void *D,
                   const struct layout *d) {
    return multiply("cublasLtMatmul", a->rows * a->columns, d->columns, 1, d->batch);
}
int cublasGetVersion_v2(void *h, int *version) { *version = CUBLAS; return 0; }
size_t cublasLtGetVersion(void) { return CUBLAS; }
int cublasGetMathMode(void *h, int *mode) { *mode = 0; return 0; }
