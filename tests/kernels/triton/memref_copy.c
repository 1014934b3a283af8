// What MLIR calls to copy one memref to another of the same shape, at any strides.
#include <stdint.h>
#include <string.h>

struct Memref {
    char *allocated, *aligned;
    int64_t offset, sizes_then_strides[];
};

struct Unranked {
    int64_t rank;
    struct Memref *memref;
};

void memrefCopy(int64_t width, struct Unranked *from, struct Unranked *to) {
    int64_t rank = from->rank, *sizes = from->memref->sizes_then_strides, count = 1;
    for (int64_t d = 0; d < rank; d++) count *= sizes[d];
    for (int64_t i = 0; i < count; i++) {
        int64_t source = from->memref->offset, target = to->memref->offset, left = i;
        for (int64_t d = rank - 1; d >= 0; d--) {
            source += left % sizes[d] * from->memref->sizes_then_strides[rank + d];
            target += left % sizes[d] * to->memref->sizes_then_strides[rank + d];
            left /= sizes[d];
        }
        memcpy(to->memref->aligned + target * width, from->memref->aligned + source * width, width);
    }
}
