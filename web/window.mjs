// A window of timesteps as numbers: how it moves, and which sampler steps it holds. No DOM, no host.

const GRID = 1000; // the number inputs have three decimals

export const rounded = (p) => Math.round(Math.min(Math.max(p, 0), 1) * GRID) / GRID;

/** The window that a text such as "0.1 - 0.8" names, or null. */
export function windowIn(text) {
  const found = String(text ?? "").match(/^\s*([\d.]+)\s*[-–,;\s]\s*([\d.]+)\s*$/);
  const window = found && [Number(found[1]), Number(found[2])];
  return window && window[0] <= window[1] && window[1] <= 1 ? window.map(rounded) : null; // not with NaN either
}

/** The window after `part` ("start", "end" or "both") moved by `delta`; start never passes end. */
export function moved(part, start, end, delta) {
  if (part === "start") return [rounded(Math.min(start + delta, end)), end];
  if (part === "end") return [start, rounded(Math.max(end + delta, start))];
  const by = Math.min(Math.max(delta, -start), 1 - end);
  return [rounded(start + by), rounded(end + by)];
}

// SD1's and SDXL's noise levels: 1000 timesteps, betas linear in their square root.
const LOG_SIGMAS = (() => {
  const [first, last, out] = [Math.sqrt(0.00085), Math.sqrt(0.012), []];
  for (let t = 0, kept = 1; t < GRID; t++) {
    kept *= 1 - (first + ((last - first) * t) / (GRID - 1)) ** 2;
    out.push(0.5 * Math.log((1 - kept) / kept));
  }
  return out;
})();
const HIGH = LOG_SIGMAS[GRID - 1];
const LOW = LOG_SIGMAS[0];

function logSigma(t) {
  const at = Math.min(Math.max(t, 0), GRID - 1);
  const low = Math.floor(at);
  const high = Math.ceil(at);
  return LOG_SIGMAS[low] + (at - low) * (LOG_SIGMAS[high] - LOG_SIGMAS[low]);
}

function percentToLogSigma(p) {
  if (p <= 0) return Infinity;
  return p >= 1 ? -Infinity : logSigma((1 - p) * (GRID - 1));
}

const even = (n, from, to) => Array.from({ length: n }, (_, i) => from + ((to - from) * i) / Math.max(n - 1, 1));

const SCHEDULES = {
  normal: (n) => even(n, GRID - 1, 0).map(logSigma),
  sgm_uniform: (n) => even(n + 1, GRID - 1, 0).slice(0, n).map(logSigma),
  simple: (n) => Array.from({ length: n }, (_, i) => LOG_SIGMAS[GRID - 1 - Math.trunc((i * GRID) / n)]),
  exponential: (n) => even(n, HIGH, LOW),
  karras: (n) => even(n, Math.exp(HIGH / 7), Math.exp(LOW / 7)).map((x) => 7 * Math.log(x)),
};

/** The first and last step (from 1) that a window holds, [] if none; null for a schedule that is not known here. */
export function stepsIn(start, end, steps, scheduler, denoise = 1) {
  const schedule = SCHEDULES[scheduler];
  if (!schedule || !(steps >= 1) || !(denoise > 0)) return null;
  const sigmas = schedule(denoise < 0.9999 ? Math.trunc(steps / denoise) : steps).slice(-steps);
  const [from, to] = [percentToLogSigma(start), percentToLogSigma(end)];
  const tiny = 1e-6; // the host compares in fp32
  const held = sigmas.flatMap((s, i) => (s > to + tiny && s <= from + tiny ? [i + 1] : []));
  return held.length ? [held[0], held[held.length - 1]] : [];
}
