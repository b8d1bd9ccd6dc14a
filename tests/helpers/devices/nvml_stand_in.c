/* A stand-in for NVML's library: two GPUs with the readings in the file CPBENCH_TEST_NVML,
   "power_mw energy_mj sm_mhz reasons", which is read at every query. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int nvmlReturn_t; /* 0 success, 3 not supported, 6 not found */
typedef struct { unsigned int index; } *device;
static struct { unsigned int index; } devices[2] = {{0}, {1}};

static unsigned long long reading(int which) {
    unsigned long long values[4] = {0, 0, 0, 0};
    FILE *file = fopen(getenv("CPBENCH_TEST_NVML"), "r");
    if (file) {
        if (fscanf(file, "%llu %llu %llu %llu", values, values + 1, values + 2, values + 3) != 4)
            values[which] = 0;
        fclose(file);
    }
    return values[which];
}

nvmlReturn_t nvmlInit_v2(void) { return getenv("CPBENCH_TEST_NVML") ? 0 : 9; /* no driver */ }
nvmlReturn_t nvmlInitWithFlags(unsigned int flags) { return nvmlInit_v2(); }
nvmlReturn_t nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(nvmlReturn_t code) {
    return code == 3 ? "Not Supported" : code == 9 ? "Driver Not Loaded" : "Unknown Error";
}
nvmlReturn_t nvmlDeviceGetCount_v2(unsigned int *count) { *count = 2; return 0; }
nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned int i, device *handle) {
    if (i > 1) return 6;
    *handle = (device)&devices[i];
    return 0;
}
nvmlReturn_t nvmlDeviceGetUUID(device handle, char *text, unsigned int size) {
    snprintf(text, size, "GPU-stand-in-%u", handle->index);
    return 0;
}
nvmlReturn_t nvmlDeviceGetName(device handle, char *text, unsigned int size) {
    snprintf(text, size, "Stand-in");
    return 0;
}
nvmlReturn_t nvmlDeviceGetPowerUsage(device handle, unsigned int *mw) {
    *mw = reading(0) + 1000 * handle->index;
    return 0;
}
nvmlReturn_t nvmlDeviceGetTotalEnergyConsumption(device handle, unsigned long long *mj) {
    *mj = reading(1);
    return 0;
}
nvmlReturn_t nvmlDeviceGetClockInfo(device handle, int type, unsigned int *mhz) {
    if (type == 2) return 3; /* the memory clock is not supported */
    *mhz = reading(2);
    return 0;
}
nvmlReturn_t nvmlDeviceGetTemperature(device handle, int sensor, unsigned int *degrees) {
    *degrees = 50 + handle->index;
    return 0;
}
nvmlReturn_t nvmlDeviceGetCurrentClocksThrottleReasons(device handle, unsigned long long *bits) {
    *bits = reading(3); /* the older of the two names of this query */
    return 0;
}
nvmlReturn_t nvmlDeviceGetMemoryInfo(device handle, unsigned long long *total_free_used) {
    total_free_used[0] = 80ull << 30;
    total_free_used[1] = 79ull << 30;
    total_free_used[2] = 1ull << 30;
    return 0;
}
nvmlReturn_t nvmlDeviceGetP2PStatus(device a, device b, int which, int *status) {
    *status = 1; /* not NVLink */
    return 0;
}
nvmlReturn_t nvmlDeviceGetTopologyCommonAncestor(device a, device b, int *level) {
    *level = 30;
    return 0;
}
