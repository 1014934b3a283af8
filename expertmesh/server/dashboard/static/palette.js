// Colours of loads: steps that look equally large (OKLab), ordered by lightness alone, so that they can be told apart
// with any colour vision and in grey. High is what stands out from the page: bright on dark, dark on light.

const STOPS = { // lightness, chroma, hue
  dark: [[0.25, 0.045, 275], [0.42, 0.105, 258], [0.59, 0.105, 215], [0.76, 0.125, 160], [0.93, 0.15, 105]],
  light: [[0.965, 0.012, 210], [0.83, 0.07, 195], [0.67, 0.105, 225], [0.49, 0.135, 258], [0.29, 0.115, 285]],
};

function lab([lightness, chroma, hue]) {
  const angle = (hue * Math.PI) / 180;
  return [lightness, chroma * Math.cos(angle), chroma * Math.sin(angle)];
}

function srgb([L, a, b]) {
  const [l, m, s] = [L + 0.3963377774 * a + 0.2158037573 * b, L - 0.1055613458 * a - 0.0638541728 * b,
    L - 0.0894841775 * a - 1.291485548 * b].map((x) => x ** 3);
  return [4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s, -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s]
    .map((x) => (x <= 0.0031308 ? 12.92 * x : 1.055 * x ** (1 / 2.4) - 0.055))
    .map((x) => Math.round(255 * Math.min(1, Math.max(0, x))));
}

const SIZE = 256;
const made = new Map();

/** 256 colours [red, green, blue] of a theme, low to high. */
export function palette(theme) {
  if (!made.has(theme)) {
    const stops = STOPS[theme].map(lab);
    made.set(theme, Array.from({ length: SIZE }, (_, i) => {
      const at = (i / (SIZE - 1)) * (stops.length - 1);
      const k = Math.min(stops.length - 2, Math.floor(at));
      return srgb(stops[k].map((x, j) => x + (at - k) * (stops[k + 1][j] - x)));
    }));
  }
  return made.get(theme);
}

export function colour(theme, part) {
  return palette(theme)[Math.round((SIZE - 1) * Math.min(1, Math.max(0, part)))];
}

export const css = ([r, g, b]) => `rgb(${r} ${g} ${b})`;

/** Black or white, whichever is read better on this. */
export function ink(rgb) {
  const [r, g, b] = rgb.map((x) => x / 255).map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
  const light = 0.2126 * r + 0.7152 * g + 0.0722 * b;
  return light > 0.179 ? "#000000" : "#ffffff";
}
