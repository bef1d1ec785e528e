/* The C ABI of Cutover. Generated from crates/capi/src/lib.rs; do not edit. */

#ifndef CUTOVER_H
#define CUTOVER_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

// What a call came to.
typedef enum CutoverStatus {
  CUTOVER_OK = 0,
  // An argument is null, not UTF-8, or contradicts itself or the model.
  CUTOVER_ARGUMENT = 1,
  // The file is no model that can be loaded and compiled.
  CUTOVER_MODEL = 2,
  // The model could not be run on these inputs.
  CUTOVER_RUN = 3,
  // A fault of this library. Free the object and make a new one.
  CUTOVER_PANIC = 4,
} CutoverStatus;

// A compiled model: shared by any number of sessions, on any threads.
typedef struct CutoverModel CutoverModel;

// One thread's memory for running a model.
typedef struct CutoverSession CutoverSession;

// A tensor that someone else owns. Elements are row-major and packed; `dtype` is ONNX's `TensorProto.DataType` (1 is f32, 7 is i64).
typedef struct CutoverTensor {
  const char *name;
  int32_t dtype;
  size_t rank;
  const int64_t *shape;
  const void *data;
  size_t data_bytes;
} CutoverTensor;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// The library's version, e.g. "0.1.0".
const char *cutover_version(void);

// What the last failed call on this thread failed for; valid until the next call on this thread.
const char *cutover_last_error(void);

// Opens an .onnx file, a package folder or a .cutover archive and compiles it for the CPU with `threads` threads, the caller's
// included; 0 for one per core. Files are mapped: nobody may change them while the model is in use.
//
// # Safety
// `path` is a string that ends in 0; `model` can be written.
enum CutoverStatus cutover_model_open(const char *path,
                                      size_t threads,
                                      struct CutoverModel **model);

// Frees a model; null is ignored. Its sessions stay valid.
//
// # Safety
// `model` came from `cutover_model_open` and was not freed.
void cutover_model_free(struct CutoverModel *model);

// The name of input `index`, or null where there are fewer. Valid as long as the model.
//
// # Safety
// `model` is a model that was not freed.
const char *cutover_model_input(const struct CutoverModel *model, size_t index);

// The name of output `index`, or null where there are fewer. Valid as long as the model.
//
// # Safety
// `model` is a model that was not freed.
const char *cutover_model_output(const struct CutoverModel *model, size_t index);

// Makes a session, for one thread at a time.
//
// # Safety
// `model` is a model that was not freed; `session` can be written.
enum CutoverStatus cutover_session_new(const struct CutoverModel *model, struct CutoverSession **session);

// Frees a session; null is ignored.
//
// # Safety
// `session` came from `cutover_session_new` and was not freed.
void cutover_session_free(struct CutoverSession *session);

// Runs the model on `inputs`, found by their names. On success the first `output_count` outputs are filled in, in the model's order;
// what they point to stays valid until the session runs again or is freed.
//
// # Safety
// `session` was not freed and is used by no other thread; `inputs` and `outputs` have as many elements as their counts say, and each
// input's pointers are valid for the lengths beside them.
enum CutoverStatus cutover_session_run(struct CutoverSession *session,
                                       const struct CutoverTensor *inputs,
                                       size_t input_count,
                                       struct CutoverTensor *outputs,
                                       size_t output_count);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* CUTOVER_H */
