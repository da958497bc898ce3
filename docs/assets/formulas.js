// Sets the formulas of a page, and again after each page that navigation loads without a reload.
// Without KaTeX, which the browser may not reach, they stay as LaTeX.
document$.subscribe(({ body }) => {
  if (!window.renderMathInElement) return;
  renderMathInElement(body, {
    delimiters: [
      { left: "\\(", right: "\\)", display: false },
      { left: "\\[", right: "\\]", display: true },
    ],
  });
});
