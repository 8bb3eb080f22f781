// Checks of what is shown, run in the page by the tests.

function nameless() {
  const fields = "button, input, select, textarea, [role=img], [role=region], [role=log], [role=tabpanel]";
  return [...document.querySelectorAll(fields)].filter((node) => {
    const text = node.tagName === "BUTTON" && node.textContent.trim();
    return !text && !node.labels?.length && !node.getAttribute("aria-label") && !node.getAttribute("aria-labelledby");
  }).map((node) => node.outerHTML);
}

function repeatedIds() {
  const ids = [...document.querySelectorAll("[id]")].map((node) => node.id);
  return ids.filter((id, i) => ids.indexOf(id) !== i);
}

/** Texts whose contrast with what is under them is lower (WCAG 2, 1.4.3). */
function lowContrast(least) {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const linear = (c) => (c / 255 <= 0.03928 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const under = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const color = rgba(getComputedStyle(at).backgroundColor);
      if (color[3] === 255) return color;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const hasText = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!hasText || !node.checkVisibility()) continue;
    if (node.matches(":disabled, script, title, desc, option, .hidden, .hidden *, .skip")) continue;
    const style = getComputedStyle(node);
    const color = rgba(node instanceof SVGElement ? style.fill : style.color);
    const [high, low] = [luminance(color), luminance(under(node))].sort((x, y) => y - x);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < least) found.push(`${node.tagName}.${node.getAttribute("class")} ${ratio.toFixed(2)}: ${node.textContent.slice(0, 40)}`);
  }
  return found;
}
