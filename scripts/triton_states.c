/* A backend of Triton that marks implicit states, for triton_states.py: which state does Triton's core hand over?
 *
 * It takes the place of the backend for ONNX Runtime in a configuration that less-export writes. Every byte of a
 * present state becomes a mark: (3 * rank + past_length) mod 251, where the rank is that of its past state among the
 * names in order. The first logits of the answer are the byte that fills each past state, by rank, -1 if not all of
 * its bytes are the same; behind them the number of states, and of dimensions of past_length.
 */
#include <stdint.h>
#include <stdio.h>
#include <string.h>

/* Of Triton's tritonserver.h and tritonbackend.h: pointers to what only Triton knows, and the numbers of two enums. */
typedef void Opaque;
enum { kCpu = 0, kFloat32 = 11, kReleaseAll = 1, kFinal = 1, kMostInputs = 1024 };
Opaque* TRITONBACKEND_RequestInputCount(Opaque* request, uint32_t* count);
Opaque* TRITONBACKEND_RequestInputByIndex(Opaque* request, uint32_t index, Opaque** input);
Opaque* TRITONBACKEND_InputProperties(Opaque* input, char const** name, int* type, int64_t const** shape,
                                      uint32_t* dims, uint64_t* bytes, uint32_t* buffers);
Opaque* TRITONBACKEND_InputBuffer(Opaque* input, uint32_t index, void const** buffer, uint64_t* bytes, int* memory,
                                  int64_t* device);
Opaque* TRITONBACKEND_ResponseNew(Opaque** response, Opaque* request);
Opaque* TRITONBACKEND_ResponseOutput(Opaque* response, Opaque** output, char const* name, int type,
                                     int64_t const* shape, uint32_t dims);
Opaque* TRITONBACKEND_OutputBuffer(Opaque* output, void** buffer, uint64_t bytes, int* memory, int64_t* device);
Opaque* TRITONBACKEND_ResponseSend(Opaque* response, uint32_t flags, Opaque* error);
Opaque* TRITONBACKEND_RequestRelease(Opaque* request, uint32_t flags);
Opaque* TRITONBACKEND_StateNew(Opaque** state, Opaque* request, char const* name, int type, int64_t const* shape,
                               uint32_t dims);
Opaque* TRITONBACKEND_StateBuffer(Opaque* state, void** buffer, uint64_t bytes, int* memory, int64_t* device);
Opaque* TRITONBACKEND_StateUpdate(Opaque* state);

#define TRY(call)                        \
    do {                                 \
        Opaque* error = (call);          \
        if (error != NULL) return error; \
    } while (0)

typedef struct {
    Opaque* handle;
    char const* name;
    int type;
    int64_t const* shape;
    uint32_t dims;
    uint64_t bytes;
    unsigned char const* data;
} Input;

static Opaque* readInput(Opaque* request, uint32_t index, Input* in) {
    uint32_t buffers;
    uint64_t bytes;
    int memory = kCpu;
    int64_t device = 0;
    TRY(TRITONBACKEND_RequestInputByIndex(request, index, &in->handle));
    TRY(TRITONBACKEND_InputProperties(in->handle, &in->name, &in->type, &in->shape, &in->dims, &in->bytes, &buffers));
    return TRITONBACKEND_InputBuffer(in->handle, 0, (void const**)&in->data, &bytes, &memory, &device);
}

static int isState(Input const* in) { return strncmp(in->name, "past.", 5) == 0; }

/* Marks the state after this step. */
static Opaque* writeState(Opaque* request, Input const* past, int mark) {
    char name[256];
    Opaque* state;
    void* data;
    int memory = kCpu;
    int64_t device = 0;
    snprintf(name, sizeof name, "present.%s", past->name + 5);
    TRY(TRITONBACKEND_StateNew(&state, request, name, past->type, past->shape, past->dims));
    TRY(TRITONBACKEND_StateBuffer(state, &data, past->bytes, &memory, &device));
    memset(data, mark, past->bytes);
    return TRITONBACKEND_StateUpdate(state);
}

static Opaque* answer(Opaque* request, Opaque* response) {
    uint32_t count, states = 0, i, j;
    Input in[kMostInputs];
    Input const* past = NULL;
    Opaque* output;
    float* logits;
    int memory = kCpu;
    int64_t device = 0;
    TRY(TRITONBACKEND_RequestInputCount(request, &count));
    if (count > kMostInputs) count = kMostInputs;
    for (i = 0; i < count; ++i) {
        TRY(readInput(request, i, &in[i]));
        states += isState(&in[i]);
        if (strcmp(in[i].name, "past_length") == 0) past = &in[i];
    }
    int64_t const shape[3] = {1, 1, states + 2};
    TRY(TRITONBACKEND_ResponseOutput(response, &output, "logits", kFloat32, shape, 3));
    TRY(TRITONBACKEND_OutputBuffer(output, (void**)&logits, sizeof(float) * (states + 2), &memory, &device));
    for (i = 0; i < count; ++i) {
        if (!isState(&in[i])) continue;
        uint32_t rank = 0;
        for (j = 0; j < count; ++j) rank += isState(&in[j]) && strcmp(in[j].name, in[i].name) < 0;
        int const same = in[i].bytes == 1 || memcmp(in[i].data, in[i].data + 1, in[i].bytes - 1) == 0;
        logits[rank] = same ? in[i].data[0] : -1;
        int32_t length;
        memcpy(&length, past->data, sizeof length);
        TRY(writeState(request, &in[i], (int)((3 * rank + (uint32_t)length) % 251)));
    }
    logits[states] = states;
    logits[states + 1] = past->dims;
    return NULL;
}

Opaque* TRITONBACKEND_ModelInstanceExecute(Opaque* instance, Opaque** requests, uint32_t count) {
    (void)instance;
    for (uint32_t i = 0; i < count; ++i) {
        Opaque* response;
        TRY(TRITONBACKEND_ResponseNew(&response, requests[i]));
        TRY(TRITONBACKEND_ResponseSend(response, kFinal, answer(requests[i], response)));
        TRY(TRITONBACKEND_RequestRelease(requests[i], kReleaseAll));
    }
    return NULL;
}
