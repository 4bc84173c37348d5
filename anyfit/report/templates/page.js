"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const frontier = data.rows.map((row, index) => (row.frontier ? index : -1)).filter((index) => index >= 0);
  const slider = document.getElementById("budget");
  const [least, most] = [Math.log2(data.bits[0]), Math.log2(data.bits[data.bits.length - 1])];

  const shade = (element, format) => {
    const depth = most > least ? (Math.log2(data.bits[format]) - least) / (most - least) : 0.5;
    element.classList.remove("middle", "upper", "strong");
    element.classList.add("shade", depth > 0.5 ? "upper" : "middle");
    element.classList.toggle("strong", depth > 0.75);
    element.style.setProperty("--mix", depth > 0.5 ? 2 * depth - 1 : 2 * depth);
  };

  const tile = (name, value) => {
    const [box, term, text] = ["div", "dt", "dd"].map((tag) => document.createElement(tag));
    [term.textContent, text.textContent] = [name, value];
    box.append(term, text);
    return box;
  };

  const swatch = (format) => {
    const box = document.createElement("span");
    box.textContent = `${data.formats[format]}: ${data.bits[format].toFixed(2)} bits`;
    shade(box, format);
    return box;
  };

  const shares = (choices) => {
    const held = data.formats.map(() => 0);
    choices.forEach((format, unit) => (held[format] += data.weights[unit]));
    const total = held.reduce((sum, part) => sum + part, 0);
    return held.flatMap((part, format) => {
      if (!part) return [];
      const piece = document.createElement("span");
      const percent = ((100 * part) / total).toFixed(part / total < 0.1 ? 1 : 0);
      piece.textContent = `${data.formats[format]} ${percent} %`;
      piece.title = `${data.formats[format]}: ${percent} % of the weights, ${data.bits[format]} bits each`;
      piece.style.flex = `${part} 0 0`;
      shade(piece, format);
      return [piece];
    });
  };

  const choose = (index) => {
    const row = data.rows[index];
    document.querySelectorAll("[data-row]").forEach((element) => element.classList.toggle("chosen", Number(element.dataset.row) === index));
    const mark = document.querySelector(`.mark[data-row="${index}"]`);
    ["x1", "x2"].forEach((end) => document.getElementById("cursor").setAttribute(end, mark.dataset.x));
    document.getElementById("size").textContent = row.size;
    document.getElementById("figures").replaceChildren(
      tile("bits per weight", row.bits), ...row.figures.map(([name, value]) => tile(name, value)),
    );
    document.getElementById("command").textContent = row.frontier
      ? `anyfit export FAMILY --budget ${row.budget} -o OUTPUT`
      : `${row.uniform ? "uniform " + row.uniform : "this mix"}: the frontier has one that is no larger and closer to the original`;
    document.getElementById("shares").replaceChildren(...shares(row.choices));
    document.querySelectorAll("[data-unit]").forEach((cell) => {
      const format = row.choices[Number(cell.dataset.unit)];
      cell.textContent = data.formats[format];
      shade(cell, format);
    });
    const place = frontier.indexOf(index);
    if (place >= 0) slider.value = place;
  };

  document.querySelector(".needs-script").hidden = false;
  document.getElementById("formats").replaceChildren(...data.formats.map((_, format) => swatch(format)));
  slider.addEventListener("input", () => choose(frontier[Number(slider.value)]));
  document.addEventListener("click", (event) => {
    const hit = event.target.closest("[data-row]");
    if (hit) choose(Number(hit.dataset.row));
  });
  choose(frontier[Math.floor(frontier.length / 2)]);
})();
