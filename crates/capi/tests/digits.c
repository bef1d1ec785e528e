/* Runs a digits model on one image: how firmware embeds Cutover. Argument: the model's path. */
#include "cutover.h"

#include <stdio.h>
#include <string.h>

/* The sixth image of models/digits/data, pixels from 0 to 16. */
static const float PIXELS[64] = {
    0.0f, 0.0f, 12.0f, 10.0f, 0.0f, 0.0f, 0.0f, 0.0f,
    0.0f, 0.0f, 14.0f, 16.0f, 16.0f, 14.0f, 0.0f, 0.0f,
    0.0f, 0.0f, 13.0f, 16.0f, 15.0f, 10.0f, 1.0f, 0.0f,
    0.0f, 0.0f, 11.0f, 16.0f, 16.0f, 7.0f, 0.0f, 0.0f,
    0.0f, 0.0f, 0.0f, 4.0f, 7.0f, 16.0f, 7.0f, 0.0f,
    0.0f, 0.0f, 0.0f, 0.0f, 4.0f, 16.0f, 9.0f, 0.0f,
    0.0f, 0.0f, 5.0f, 4.0f, 12.0f, 16.0f, 4.0f, 0.0f,
    0.0f, 0.0f, 9.0f, 16.0f, 16.0f, 10.0f, 0.0f, 0.0f,
};

static int failed(const char *what) {
    fprintf(stderr, "%s: %s\n", what, cutover_last_error());
    return 1;
}

int main(int argc, char **argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: digits MODEL\n");
        return 2;
    }
    CutoverModel *model = NULL;
    CutoverSession *session = NULL;
    if (cutover_model_open("no such file", 1, &model) != CUTOVER_MODEL || strlen(cutover_last_error()) == 0) {
        fprintf(stderr, "a file that is not there was opened\n");
        return 1;
    }
    if (cutover_model_open(argv[1], 1, &model) != CUTOVER_OK) return failed("open");
    if (cutover_session_new(model, &session) != CUTOVER_OK) return failed("session");

    float image[64];
    for (int i = 0; i < 64; i++) image[i] = PIXELS[i] / 16.0f;
    const int64_t shape[4] = {1, 1, 8, 8};
    CutoverTensor input = {cutover_model_input(model, 0), 1, 4, shape, image, sizeof image};
    CutoverTensor output;

    CutoverTensor wrong = input;
    wrong.rank = 3;
    if (cutover_session_run(session, &wrong, 1, &output, 1) == CUTOVER_OK) {
        fprintf(stderr, "an input of the wrong rank was accepted\n");
        return 1;
    }
    if (cutover_session_run(session, &input, 1, &output, 1) != CUTOVER_OK) return failed("run");

    const float *probabilities = output.data;
    int best = 0;
    for (int i = 1; i < (int)output.shape[1]; i++) {
        if (probabilities[i] > probabilities[best]) best = i;
    }
    printf("the digit is %d (%s of %zu bytes)\n", best, output.name, output.data_bytes);
    cutover_session_free(session);
    cutover_model_free(model);
    return 0;
}
