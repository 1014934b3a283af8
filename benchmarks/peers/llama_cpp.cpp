// One measurement of llama.cpp: measure MODEL.gguf THREADS REPEATS PROMPTS
// The same work in the same order as expertmesh/bench/driver.py, through llama.cpp's C interface. PROMPTS has one prompt
// a line, token ids with spaces between. Prints one line of JSON: seconds, bytes, tokens/s.
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "ggml-cpu.h"
#include "llama.h"

using Tokens = std::vector<llama_token>;

static const std::map<int, int> DECODE_TOKENS = {{1, 48}, {16, 24}};  // batch -> tokens of each sequence
static const int CELLS = 1024;  // of the cache: the longest prompt, or 16 sequences of 32 and 25

[[noreturn]] static void fail(const std::string & what) {
    fprintf(stderr, "%s\n", what.c_str());
    exit(2);
}

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Bytes that this process has held at most.
static long peak_rss() {
    // What getrusage says may be of the program that started this one.
    std::ifstream status("/proc/self/status");
    for (std::string word; status >> word;)
        if (long kilobytes; word == "VmHWM:" && status >> kilobytes) return kilobytes * 1024;
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
#ifdef __APPLE__
    return usage.ru_maxrss;
#else
    return usage.ru_maxrss * 1024;
#endif
}

static double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    size_t half = values.size() / 2;
    return values.size() % 2 ? values[half] : (values[half - 1] + values[half]) / 2;
}

class Engine {
  public:
    Engine(const char * path, int threads) {
        auto given = llama_model_default_params();
        // Weights laid out anew for AMX: this build ends at once where it does so to this architecture's.
        given.use_extra_bufts = !ggml_cpu_has_amx_int8();
        model = llama_model_load_from_file(path, given);
        if (!model) fail(std::string("llama.cpp cannot load ") + path);
        vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
        auto params = llama_context_default_params();
        params.n_ctx = params.n_batch = params.n_ubatch = CELLS;
        params.n_seq_max = 16;
        params.n_outputs_max = 16;
        params.n_threads = params.n_threads_batch = threads;
        // The cache stays in F16, which is at least as fast as BF16.
        params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
        params.kv_unified = true;  // else every sequence has room for a share of the cells only
        context = llama_init_from_model(model, params);
        if (!context) fail("llama.cpp cannot make a context");
    }

    // The first token that follows each prompt, after computing all of them in one batch.
    Tokens start(const std::vector<Tokens> & prompts) {
        llama_memory_clear(llama_get_memory(context), false);
        position = 0;
        size_t rows = 0;
        for (const auto & prompt : prompts) rows += prompt.size();
        auto batch = llama_batch_init(rows, 0, 1);
        for (size_t sequence = 0; sequence < prompts.size(); sequence++)
            for (size_t place = 0; place < prompts[sequence].size(); place++)
                add(batch, prompts[sequence][place], place, sequence, place + 1 == prompts[sequence].size());
        position = prompts[0].size();
        auto chosen = run(batch);
        llama_batch_free(batch);
        return chosen;
    }

    // One more token of every sequence.
    Tokens step(const Tokens & tokens) {
        auto batch = llama_batch_init(tokens.size(), 0, 1);
        for (size_t sequence = 0; sequence < tokens.size(); sequence++) add(batch, tokens[sequence], position, sequence, true);
        position++;
        auto chosen = run(batch);
        llama_batch_free(batch);
        return chosen;
    }

    ~Engine() {
        llama_free(context);
        llama_model_free(model);
    }

  private:
    static void add(llama_batch & batch, llama_token token, int place, int sequence, bool wanted) {
        int row = batch.n_tokens++;
        batch.token[row] = token;
        batch.pos[row] = place;
        batch.n_seq_id[row] = 1;
        batch.seq_id[row][0] = sequence;
        batch.logits[row] = wanted;
    }

    // The most likely next token of every row whose logits are wanted.
    Tokens run(const llama_batch & batch) {
        if (llama_decode(context, batch)) fail("llama_decode failed");
        Tokens chosen;
        for (int row = 0; row < batch.n_tokens; row++) {
            if (!batch.logits[row]) continue;
            const float * logits = llama_get_logits_ith(context, row);
            chosen.push_back(std::max_element(logits, logits + vocabulary) - logits);
        }
        return chosen;
    }

    llama_model * model = nullptr;
    llama_context * context = nullptr;
    int vocabulary = 0;
    int position = 0;
};

class Prompts {
  public:
    explicit Prompts(const char * path) : file(path) {}

    Tokens next() {
        std::string line;
        if (!std::getline(file, line)) fail("the file of prompts ends too early");
        std::istringstream numbers(line);
        Tokens tokens;
        for (llama_token token; numbers >> token;) tokens.push_back(token);
        return tokens;
    }

    std::vector<Tokens> next(int count) {
        std::vector<Tokens> prompts;
        while (count--) prompts.push_back(next());
        return prompts;
    }

  private:
    std::ifstream file;
};

// Seconds for `count` further tokens of every prompt after the first one.
static double decode(Engine & engine, const std::vector<Tokens> & prompts, int count, Tokens & first) {
    auto tokens = engine.start(prompts);
    first.insert(first.end(), tokens.begin(), tokens.end());
    double start = now();
    while (count--) tokens = engine.step(tokens);
    return now() - start;
}

int main(int argc, char ** argv) {
    if (argc != 5) fail("usage: measure MODEL.gguf THREADS REPEATS PROMPTS");
    llama_log_set([](ggml_log_level level, const char * text, void *) { if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr); }, nullptr);
    int repeats = atoi(argv[3]);
    Prompts prompts(argv[4]);
    llama_backend_init();
    long bare = peak_rss();
    double start = now();
    Engine engine(argv[1], atoi(argv[2]));
    double load = now() - start;

    Tokens first;
    engine.start(prompts.next(1));
    decode(engine, prompts.next(1), 4, first);
    std::vector<double> prefill;
    std::map<int, std::vector<double>> speeds;
    for (int repeat = 0; repeat < repeats; repeat++) {
        auto prompt = prompts.next(1);
        start = now();
        engine.start(prompt);
        prefill.push_back(prompt[0].size() / (now() - start));
        for (auto [batch, count] : DECODE_TOKENS)
            speeds[batch].push_back(batch * count / decode(engine, prompts.next(batch), count, first));
    }
    printf("{\"load_seconds\": %g, \"bare_rss_bytes\": %ld, \"peak_rss_bytes\": %ld, ", load, bare, peak_rss());
    printf("\"prefill_tokens_per_second\": %g, \"decode_tokens_per_second\": {", median(prefill));
    for (auto & [batch, found] : speeds) printf("%s\"%d\": %g", batch == 1 ? "" : ", ", batch, median(found));
    printf("}, \"first_tokens\": [");
    for (size_t i = 0; i < first.size(); i++) printf("%s%d", i ? ", " : "", first[i]);
    printf("]}\n");
}
