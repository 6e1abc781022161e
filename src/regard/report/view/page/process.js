// virtual-core asks, as bundlers answer it, which kind of build this is.
globalThis.process ??= { env: { NODE_ENV: "production" } };
