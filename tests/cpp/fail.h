// What failed, told on stderr; the program goes on.
#pragma once
#include <cstdio>
#include <string>

static int failures = 0;
static std::string where;

static void fail(const std::string& what) {
    if (failures++ < 30) fprintf(stderr, "FAILED %s: %s\n", where.c_str(), what.c_str());
}
